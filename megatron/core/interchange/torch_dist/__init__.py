"""Folders of Megatron-LM's `torch_dist` format, which are PyTorch's distributed checkpoints, read without torch."""

from megatron.core.interchange.torch_dist.arguments import saved_arguments
from megatron.core.interchange.torch_dist.metadata import METADATA_FILE, is_torch_dist
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder

__all__ = ["METADATA_FILE", "CheckpointFolder", "is_torch_dist", "saved_arguments"]
