"""The whole road on real text that Python itself ships, on four CPU processes."""
