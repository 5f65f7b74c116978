"""Layout-free checkpoints: tensors under global names, saved by one division among ranks and read by any other."""

from megatron.core.dist_checkpointing.blocks import TensorShard
from megatron.core.dist_checkpointing.metadata import StoredTensor, lacks_files
from megatron.core.dist_checkpointing.reader import CheckpointReader
from megatron.core.dist_checkpointing.writer import snapshot, step_files, write_metadata, write_shards

__all__ = [
    "CheckpointReader",
    "StoredTensor",
    "TensorShard",
    "lacks_files",
    "snapshot",
    "step_files",
    "write_metadata",
    "write_shards",
]
