"""Operations in C++ for CPUs, in float32 and bfloat16, on torch's threads.

Built when the package is installed, if there is a compiler; `wrapper.py` calls them.
"""
