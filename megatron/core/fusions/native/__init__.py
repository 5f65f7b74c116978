"""The C++ form of the operations in `megatron.core.fusions`, for CPUs: float32 and bfloat16, on torch's threads.

Built when the package is installed, if there is a compiler. Each operation's own file picks between this and its
PyTorch form, which the tests compare it with.
"""
