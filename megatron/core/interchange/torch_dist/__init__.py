"""Megatron-LM's `torch_dist` format, PyTorch's distributed checkpoints, read and written without torch."""

from megatron.core.interchange.torch_dist.arguments import saved_arguments
from megatron.core.interchange.torch_dist.metadata import METADATA_FILE, Chunk, Place, SavedTensor
from megatron.core.interchange.torch_dist.run_state import RunState, saved_run
from megatron.core.interchange.torch_dist.tensors import CheckpointFolder
from megatron.core.interchange.torch_dist.weights import STATE_KINDS, WEIGHT, ModelKeys
from megatron.core.interchange.torch_dist.writing import encode_metadata

__all__ = [
    "METADATA_FILE",
    "STATE_KINDS",
    "WEIGHT",
    "CheckpointFolder",
    "Chunk",
    "ModelKeys",
    "Place",
    "RunState",
    "SavedTensor",
    "encode_metadata",
    "saved_arguments",
    "saved_run",
]
