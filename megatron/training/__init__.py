"""The training program: flags, start-up, the loop, checkpoints and logs."""
