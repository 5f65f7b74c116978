"""A Megatron-style toolkit that pre-trains Mixtral models."""
