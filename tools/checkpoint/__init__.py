"""Conversion of checkpoints between Hugging Face's format and Megatron's."""
