"""The parts of tools/gpu_check.py. Whatever imports torch runs in a process of its own, which can be ended."""
