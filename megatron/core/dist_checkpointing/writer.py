"""Writing a step: one safetensors file a rank, then the metadata that makes a checkpoint of them."""

import contextlib
import json
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.atomic_files import atomic_writer
from megatron.core.dist_checkpointing import metadata as md
from megatron.core.dist_checkpointing.blocks import DTYPE_NAMES, Block, TensorShard, Values
from megatron.core.interchange.folder_kind import SHARDED_FILE
from megatron.core.waiting import to_host, waiting

CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True)
class WrittenFile:
    """What a rank wrote: plain values, to be sent to the rank that writes the metadata."""

    name: str
    file: md.StoredFile
    tensors: tuple[md.StoredTensor, ...]
    """Each with the blocks that lie in this file."""


def snapshot(shards: Iterable[TensorShard], memory: list[Tensor] | None = None) -> list[TensorShard]:
    """Copies of the owned shards in host memory: what happens to the tensors later does not change them.

    `memory` keeps what the copies lie in for the next call with the same shards, which overwrites these copies:
    fresh memory costs more time than the copying, and pinned memory, which a GPU copies to fastest, most of all.
    """
    owned = [shard for shard in shards if shard.owned]
    memory = [] if memory is None else memory
    if [(place.numel(), place.dtype) for place in memory] != [(s.data.numel(), s.data.dtype) for s in owned]:
        memory[:] = [_host_memory(shard.data) for shard in owned]
    for place, shard in zip(memory, owned, strict=True):
        place.copy_(shard.data[:].detach(), non_blocking=True)
    if any(shard.data.device.type == "cuda" for shard in owned):
        with waiting("the device"):
            torch.cuda.current_stream().synchronize()
    return [replace(shard, data=place) for place, shard in zip(memory, owned, strict=True)]


def _host_memory(data: Tensor | Values) -> Tensor:
    """Memory for a copy of `data`: pinned for a GPU, as long as the system grants that."""
    if data.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.empty(data.numel(), dtype=data.dtype, pin_memory=True)
    return torch.empty(data.numel(), dtype=data.dtype)


def write_shards(folder: Path, rank: int, shards: Sequence[TensorShard]) -> WrittenFile | None:
    """Writes the owned shards of a rank to `rank_NNNNN.safetensors`, a part of a tensor at a time.

    None if there is nothing to write. Raises OSError naming the file if it cannot be written.
    """
    assert sys.byteorder == "little", "safetensors files are little-endian"
    # wide types first, so that every tensor is aligned to its elements
    owned = sorted((shard for shard in shards if shard.owned), key=lambda shard: -shard.data.dtype.itemsize)
    blocks = [(shard, block) for shard in owned for block in shard.blocks()]
    if not blocks:
        return None
    name = f"rank_{rank:05d}.safetensors"
    header, offsets = _header(blocks)
    with atomic_writer(folder / name) as file:
        file.write(header)
        checksums = [_write_block(file, shard.data, block) for shard, block in blocks]
        size = file.tell()
    stored: dict[tuple[str, str], md.StoredTensor] = {}
    for (shard, block), offset, checksum in zip(blocks, offsets, checksums, strict=True):
        key = shard.kind, shard.name
        tensor = stored.get(key) or md.StoredTensor(
            *key, shard.data.dtype, shard.shape, shard.partition_dim, shard.stride, ()
        )
        piece = md.StoredBlock(block._replace(offset=offset), name, checksum)
        stored[key] = replace(tensor, blocks=(*tensor.blocks, piece))
    return WrittenFile(name, md.StoredFile(size, len(header), zlib.crc32(header)), tuple(stored.values()))


def _header(blocks: Sequence[tuple[TensorShard, Block]]) -> tuple[bytes, list[int]]:
    """The safetensors header, and the byte of the file where each block begins."""
    entries: dict[str, Any] = {}
    offsets, offset = [], 0
    for shard, block in blocks:
        size = block.numel * shard.data.dtype.itemsize
        rectangle = f"{block.row_begin}:{block.row_end},{block.column_begin}:{block.column_end}"
        entries[f"{shard.kind}/{shard.name}[{rectangle}]"] = {
            "dtype": DTYPE_NAMES[shard.data.dtype],
            "shape": [block.rows, block.columns],
            "data_offsets": [offset, offset + size],
        }
        offsets.append(offset)
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + offset for offset in offsets]


def _write_block(file: Any, data: Tensor | Values, block: Block) -> int:
    checksum, end = 0, block.offset + block.numel
    for begin in range(block.offset, end, CHUNK_ELEMENTS):
        chunk = data[begin : min(begin + CHUNK_ELEMENTS, end)].detach()
        content = memoryview(to_host(chunk).view(torch.uint8).numpy())  # type: ignore[arg-type]
        checksum = zlib.crc32(content, checksum)
        file.write(content)
    return checksum


def write_metadata(
    folder: Path,
    written: Iterable[WrittenFile | None],
    *,
    iteration: int,
    arguments: dict[str, Any],
    state: dict[str, Any],
) -> md.Metadata:
    """Writes the metadata of a step whose ranks wrote `written`; the step is complete after this.

    Raises ValueError naming a tensor that the ranks together did not save exactly once.
    """
    files: dict[str, md.StoredFile] = {}
    tensors: dict[tuple[str, str], md.StoredTensor] = {}
    for part in written:
        if part is None:
            continue
        files[part.name] = part.file
        for tensor in part.tensors:
            known = tensors.get((tensor.kind, tensor.name))
            if known is None:
                tensors[tensor.kind, tensor.name] = tensor
                continue
            if replace(known, blocks=()) != replace(tensor, blocks=()):
                raise ValueError(f"ranks disagree about the shape or type of {tensor.kind} of {tensor.name}")
            tensors[tensor.kind, tensor.name] = replace(known, blocks=known.blocks + tensor.blocks)
    metadata = md.Metadata(iteration, arguments, state, files, tensors)
    md.write(folder, metadata)
    return metadata


def step_files(metadata: md.Metadata) -> set[str]:
    """Names of all files that belong to a step."""
    return {SHARDED_FILE, *metadata.files}
