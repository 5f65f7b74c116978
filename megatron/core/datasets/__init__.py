"""Token files, training samples, blends and the order they are read in."""
