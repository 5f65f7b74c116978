"""The parts of tools/gpu_check.py. Whatever imports torch runs in a separate process, which can be ended."""
