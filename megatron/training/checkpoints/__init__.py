"""Checkpoints of a run: their formats (`formats.py` is the table), saving, resuming, and the folder of --save."""
