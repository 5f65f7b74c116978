"""What a run says of itself: its summary, the numbers of each step, and which rank holds up the others."""
