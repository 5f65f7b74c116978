"""Megatron-LM's `torch_dist` format, PyTorch's distributed checkpoints, read and written without torch."""

from megatron.core.interchange.torch_dist.arguments import saved_arguments
from megatron.core.interchange.torch_dist.metadata import METADATA_FILE, Chunk, Place, SavedTensor
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.interchange.torch_dist.writing import encode_metadata

__all__ = [
    "METADATA_FILE",
    "CheckpointFolder",
    "Chunk",
    "Place",
    "SavedTensor",
    "encode_metadata",
    "saved_arguments",
]
