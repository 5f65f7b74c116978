"""All steps on real text that Python itself ships, on four CPU processes."""
