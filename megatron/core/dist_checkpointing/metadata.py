"""`sharded.json` of a step: what is saved, where each rectangle of each tensor lies, and checksums of everything."""

import json
import math
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron.core.atomic_files import atomic_writer
from megatron.core.dist_checkpointing.blocks import DTYPE_NAMES, DTYPES, Block, matrix_shape, missing_elements
from megatron.core.interchange.folder_kind import SHARDED_FILE, sharded_file
from megatron.core.text_files import read_json

FORMAT = "megatron-mixtral sharded checkpoint"
_OLD_FORMAT = "megatron-mixtral training checkpoint"  # of steps whose description is called metadata.json
VERSION = 1
_MOST, _MOST_DIMENSIONS = 1 << 56, 64


@dataclass(frozen=True)
class StoredBlock:
    """One rectangle in a file."""

    block: Block
    """Its `offset` is the byte in the file where it begins."""
    file: str
    checksum: int
    """CRC-32 of its bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor of a checkpoint, and the pieces it was saved in."""

    kind: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    partition_dim: int | None
    stride: int
    blocks: tuple[StoredBlock, ...]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the matrix that its blocks are parts of."""
        return matrix_shape(self.shape, self.partition_dim, self.stride)


@dataclass(frozen=True)
class StoredFile:
    """One file of a step."""

    size: int
    """Bytes."""
    header_size: int
    """Bytes before the first tensor."""
    header_checksum: int
    """CRC-32 of those."""


@dataclass(frozen=True)
class Metadata:
    """All that is known of a step apart from the tensors' values."""

    iteration: int
    arguments: dict[str, Any]
    """Every setting of the run, as plain values."""
    state: dict[str, Any]
    """Progress, optimizer step and what else is not a tensor, as plain values."""
    files: dict[str, StoredFile]
    tensors: dict[tuple[str, str], StoredTensor]
    """By kind and name."""


def lacks_files(folder: Path) -> bool:
    """Whether a file of a step is absent or of another size. Raises ValueError if the metadata is damaged."""
    files = read(folder).files
    return any(
        not (folder / name).is_file() or (folder / name).stat().st_size != file.size for name, file in files.items()
    )


def write(folder: Path, metadata: Metadata) -> None:
    """Writes `sharded.json`. Raises ValueError if a tensor is not covered exactly once."""
    check_complete(folder, metadata)
    content = _to_plain(metadata)
    text = json.dumps({"format": FORMAT, "version": VERSION, "checksum": _checksum(content), "content": content})
    with atomic_writer(folder / SHARDED_FILE) as file:
        file.write(text.encode("utf-8"))


def read(folder: Path) -> Metadata:
    """Reads and checks `sharded.json`. Raises FileNotFoundError, or ValueError naming the file and what is wrong."""
    path = sharded_file(folder)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is damaged, use another step")
    document: Any = None
    try:
        document = read_json(path)
        name, version = document["format"], document["version"]
        checksum, content = document["checksum"], document["content"]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(document, dict) and "sharded_backend" in document:
            raise ValueError(
                f"{path} is of a checkpoint of Megatron-LM, whose other files are missing: restore them"
            ) from error
        raise ValueError(f"{path} is damaged or cut short: restore it, or use another step") from error
    if name not in (FORMAT, _OLD_FORMAT) or version != VERSION:
        raise ValueError(f"{path} is of format {name!r} version {version!r}, not {FORMAT!r} version {VERSION}")
    if checksum != _checksum(content):
        raise ValueError(f"{path} was altered: its checksum does not match; restore it, or use another step")
    try:
        metadata = _from_plain(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!s:.200}; restore it, or use another step") from error
    check_complete(folder, metadata)
    return metadata


def check_complete(folder: Path, metadata: Metadata) -> None:
    """Raises ValueError naming the first tensor whose elements are not all there exactly once."""
    for tensor in metadata.tensors.values():
        missing = missing_elements([stored.block for stored in tensor.blocks], *tensor.matrix)
        if missing:
            problem = f"lacks {missing} elements" if missing > 0 else "has elements twice or too many"
            raise ValueError(f"{folder}: {tensor.kind} of {tensor.name} {problem}: the checkpoint cannot be used")
        for stored in tensor.blocks:
            file = metadata.files.get(stored.file)
            end = stored.block.offset + stored.block.numel * tensor.dtype.itemsize
            if file is None or stored.block.offset < file.header_size or end > file.size:
                raise ValueError(f"{folder}: {tensor.kind} of {tensor.name} lies outside of {stored.file}")
    _check_apart(folder, metadata)


def _check_apart(folder: Path, metadata: Metadata) -> None:
    """Raises ValueError if two blocks share bytes of a file: reading all would then read more than the files have."""
    places = sorted(
        (stored.file, stored.block.offset, stored.block.numel * tensor.dtype.itemsize)
        for tensor in metadata.tensors.values()
        for stored in tensor.blocks
    )
    for (file, offset, nbytes), (following, begin, _) in pairwise(places):
        if file == following and offset + nbytes > begin:
            raise ValueError(f"{folder / file}: two tensors share the bytes at {begin}: the checkpoint cannot be used")


def _checksum(content: Any) -> int:
    return zlib.crc32(json.dumps(content, separators=(",", ":")).encode("utf-8"))


def _to_plain(metadata: Metadata) -> dict[str, Any]:
    numbers = {name: number for number, name in enumerate(metadata.files)}
    return {
        "iteration": metadata.iteration,
        "arguments": metadata.arguments,
        "state": metadata.state,
        "files": [[name, f.size, f.header_size, f.header_checksum] for name, f in metadata.files.items()],
        "tensors": [
            [t.kind, t.name, DTYPE_NAMES[t.dtype], list(t.shape), t.partition_dim, t.stride,
             [[numbers[s.file], s.checksum, *s.block] for s in t.blocks]]
            for t in metadata.tensors.values()
        ],
    }  # fmt: skip


def _from_plain(content: dict[str, Any]) -> Metadata:
    files = {name: StoredFile(*_numbers(numbers, 3)) for name, *numbers in content["files"]}
    for name in files:
        if not re.fullmatch(r"rank_[0-9]{5,}\.safetensors", name):
            raise ValueError(f"{name!r} is not the name of a file of a checkpoint")
    names = list(files)
    tensors = {}
    for kind, name, dtype, shape, partition_dim, stride, blocks in content["tensors"]:
        if not isinstance(kind, str) or not isinstance(name, str):
            raise ValueError("a tensor's kind or name is not a text")
        if not _can_be_cut(shape, partition_dim, stride):
            raise ValueError(f"{name}: a tensor cannot be of shape {shape}, cut at {partition_dim} in {stride}")
        if len(blocks) > math.prod(shape):
            raise ValueError(f"{name} has more pieces than elements")
        stored = []
        for block in blocks:
            file, checksum, *place = _numbers(block, 7)
            if file >= len(names):
                raise ValueError(f"{name}: there is no file {file}")
            stored.append(StoredBlock(Block(*place), names[file], checksum))
        tensor = StoredTensor(kind, name, DTYPES[dtype], tuple(shape), partition_dim, stride, tuple(stored))
        tensors[kind, name] = tensor
    iteration, arguments, state = _numbers([content["iteration"]], 1)[0], content["arguments"], content["state"]
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise ValueError("its arguments or its state have no names")
    return Metadata(iteration, arguments, state, files, tensors)


def _numbers(values: Any, count: int) -> list[int]:
    """`values`, if they are `count` sizes or positions. Raises ValueError if not."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{count} numbers are needed")
    if values and (set(map(type, values)) != {int} or min(values) < 0 or max(values) >= _MOST):
        raise ValueError(f"not all of {values} are sizes")
    return values


def _can_be_cut(shape: Any, partition_dim: Any, stride: Any) -> bool:
    """Whether there is a tensor of this shape that is cut along that dimension in that many blocks."""
    _numbers([stride], 1)
    if not isinstance(shape, list) or len(_numbers(shape, len(shape))) > _MOST_DIMENSIONS or math.prod(shape) >= _MOST:
        return False
    if partition_dim is None:
        return True
    return partition_dim in range(len(shape)) and stride > 0 and shape[partition_dim] % stride == 0
