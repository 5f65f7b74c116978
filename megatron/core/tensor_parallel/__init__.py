"""Tensor and sequence parallelism (Megatron-LM, arXiv:1909.08053 and arXiv:2205.05198)."""
