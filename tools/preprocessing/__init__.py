"""The parts of tools/preprocess_data.py."""
