"""One operation a file: the plain PyTorch form of each, which picks the fastest backend the device has."""
