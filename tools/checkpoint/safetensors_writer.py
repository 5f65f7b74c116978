"""Writing a model's tensors to safetensors shards one tensor at a time, without holding a shard in memory."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.core.atomic_files import atomic_writer

_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and type of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def plan_shards(tensors: Iterable[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    """The tensors in order, a new shard begun where `max_shard_size` bytes would be exceeded."""
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_shard(path: Path, plan: Sequence[TensorPlan], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Writes a safetensors file from tensors given in the order of `plan`; it appears only when it is complete.

    Raises ValueError if a tensor is not the planned one.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in plan:
        header[planned.name] = {
            "dtype": _DTYPE_NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    stream = iter(tensors)
    with atomic_writer(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            name, tensor = next(stream, ("nothing", torch.empty(0)))
            if (name, tuple(tensor.shape), tensor.dtype) != (planned.name, planned.shape, planned.dtype):
                raise ValueError(f"expected {planned} but got {name}, {tuple(tensor.shape)}, {tensor.dtype}")
            file.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]
