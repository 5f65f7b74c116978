"""What a folder of PyTorch's distributed checkpoint holds, read as data.

Its `.metadata` is a pickle of torch's own classes: the shape of each tensor, the chunks that it was cut into, and the
place of each chunk in a `.distcp` file. As in `torch_pickle`, nothing in it is imported or called; the names below
stand for records of plain values, planners and enumerations for nothing, and any other name is refused.
"""

import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.core.interchange.pickle_machine import PickleMachine
from megatron.core.interchange.torch_archive import DamagedError
from megatron.core.interchange.torch_file import readable
from megatron.core.interchange.torch_pickle import INERT_PREFIXES, Inert, itemsize

METADATA_FILE = ".metadata"
_OF_TORCH = "torch.distributed.checkpoint."
_RECORDS = {
    _OF_TORCH + "metadata." + name
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
} | {
    _OF_TORCH + "metadata.TensorProperties",
    _OF_TORCH + "filesystem._StorageInfo",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",  # of torch before 2.3
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
}
_INERT = {
    _OF_TORCH + "metadata.StorageMeta", _OF_TORCH + "metadata._MEM_FORMAT_ENCODING", "torch.serialization._get_layout",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING", "pathlib.PosixPath", "pathlib.WindowsPath",
}  # fmt: skip
_MOST_CELLS = 1 << 22
_LARGEST = 1 << 30
"""Bytes of a `.metadata` that is read: that of an 8x22B with its optimizer, saved by 1,024 ranks, has some 100 MB."""


class Place(NamedTuple):
    """Bytes in a file of the folder."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A rectangle of a tensor: stored by `torch.save` at its place, all of an archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that its chunks cover, each element once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Catalog:
    """Everything in a folder by its key."""

    tensors: dict[str, SavedTensor]
    objects: dict[str, Place]


class _Record:
    """Plain values under the names that one of torch's classes gives them."""

    def __init__(self, kind: str) -> None:
        self._kind = kind


class _Kind(NamedTuple):
    name: str


class _Reader:
    """Gives the names in the pickle their meaning."""

    def __init__(self, data: bytes) -> None:
        most = 10_000 + len(data)
        self._machine = PickleMachine(data, 0, most, self._find, self._storage, self._call, self._set_state)
        self.run = self._machine.run

    def _find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _RECORDS:
            return _Kind(full.rpartition(".")[2])
        if full == "torch.Size":
            return tuple
        if module == "torch" and re.fullmatch(r"(bfloat|float|complex|uint|int|bool)[0-9]*(_\w+)?", name):
            return name
        if full in _INERT or full.startswith((_OF_TORCH + "planner.", *INERT_PREFIXES)):
            return Inert
        raise pickle.UnpicklingError(f"GLOBAL {full}")

    def _storage(self, _: Any) -> Any:
        raise pickle.UnpicklingError("a storage")

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function is Inert:
            return Inert()
        if function is tuple and len(arguments) == 1 and isinstance(arguments[0], tuple | list):
            self._machine.spend(len(arguments[0]))
            return tuple(arguments[0])
        if isinstance(function, _Kind) and not arguments:
            return _Record(function.name)
        raise pickle.UnpicklingError("a call")

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, Inert):
            return
        if not isinstance(target, _Record):
            raise pickle.UnpicklingError("a state")
        if isinstance(state, tuple) and state:  # TensorProperties: its type first
            state = {"dtype": state[0]}
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError("a state")
        self._machine.spend(len(state))
        vars(target).update(state)


def read_catalog(folder: Path) -> Catalog:
    """What `folder` holds. Raises ValueError, naming the file and the key, unless every chunk is where it should be."""
    path = folder / METADATA_FILE
    with readable(path):
        if path.stat().st_size > _LARGEST:
            raise DamagedError(f"it has more than {_LARGEST} bytes, more than that of any model")
        content = _Reader(path.read_bytes()).run()
        saved, stored = _field(content, "Metadata", "state_dict_metadata"), _field(content, "Metadata", "storage_data")
        if not isinstance(saved, dict) or not isinstance(stored, dict):
            raise DamagedError("it is no distributed checkpoint of PyTorch")
        sizes: dict[str, int] = {}
        places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
        for index, info in stored.items():
            key, offset = _field(index, "MetadataIndex", "fqn"), _field(index, "MetadataIndex", "offset", None)
            if not isinstance(key, str) or (key, offset) in places or not (offset is None or _is_shape(offset)):
                raise DamagedError(f"it has the place of {key!r} twice or of no key")
            places[key, offset] = _place(folder, key, info, sizes)
        tensors, objects = {}, {}
        for key, entry in saved.items():
            if not isinstance(key, str) or not isinstance(entry, _Record):
                raise DamagedError(f"the key {key!r} holds nothing that is known")
            if entry._kind == "BytesStorageMetadata":
                objects[key] = _known(places, key, None)
            else:
                tensors[key] = _tensor(key, entry, places)
        return Catalog(tensors, objects)


_NEEDED = object()


def _field(record: Any, kind: str, name: str, missing: Any = _NEEDED) -> Any:
    kinds = (kind, "MCoreMetadata") if kind == "Metadata" else (kind,)
    if not isinstance(record, _Record) or record._kind not in kinds:
        raise DamagedError(f"it has something else where a {kind} belongs")
    value = vars(record).get(name, missing)
    if value is _NEEDED:
        raise DamagedError(f"a {kind} in it has no {name}")
    return value


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(size) is int and size >= 0 for size in value)


def _known(places: dict[Any, Place], key: str, offset: tuple[int, ...] | None) -> Place:
    if (key, offset) not in places:
        raise DamagedError(f"nothing says where {key} is" + ("" if offset is None else f" from {list(offset)} on"))
    return places[key, offset]


def _place(folder: Path, key: str, info: Any, sizes: dict[str, int]) -> Place:
    """A place within a file that is there; `sizes` has those of the files seen so far."""
    file, offset, length = (_field(info, "_StorageInfo", name) for name in ("relative_path", "offset", "length"))
    if _field(info, "_StorageInfo", "transform_descriptors", None):
        raise DamagedError(f"{key} is compressed or encrypted, which is not supported")
    if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.distcp", file, re.ASCII):
        raise DamagedError(f"{key} is said to be in a file {ascii(file)[:100]}")
    if file not in sizes:
        if not (folder / file).is_file():
            raise DamagedError(f"{key} is in {file}, which is not there")
        sizes[file] = (folder / file).stat().st_size
    if type(offset) is not int or type(length) is not int or min(offset, length) < 0 or offset + length > sizes[file]:
        raise DamagedError(f"{key} lies beyond the end of {file}")
    return Place(file, offset, length)


def _tensor(key: str, entry: Any, places: dict[Any, Place]) -> SavedTensor:
    dtype = _field(_field(entry, "TensorStorageMetadata", "properties"), "TensorProperties", "dtype")
    shape, described = (_field(entry, "TensorStorageMetadata", name) for name in ("size", "chunks"))
    if not isinstance(dtype, str) or not _is_shape(shape) or not isinstance(described, list):
        raise DamagedError(f"{key} is described in a way that no tensor is")
    chunks = []
    for chunk in described:
        offsets, sizes = (_field(chunk, "ChunkStorageMetadata", name) for name in ("offsets", "sizes"))
        within = _is_shape(offsets) and _is_shape(sizes) and len(offsets) == len(sizes) == len(shape)
        if not within or any(start + size > end for start, size, end in zip(offsets, sizes, shape, strict=True)):
            raise DamagedError(f"a chunk of {key} lies outside of its shape {list(shape)}")
        place = _known(places, key, offsets)
        if math.prod(sizes) * itemsize(dtype) > place.length:
            raise DamagedError(f"a chunk of {key} has more elements than bytes in {place.file}")
        chunks.append(Chunk(offsets, sizes, place))
    _check_cover(key, shape, chunks)
    return SavedTensor(dtype, shape, tuple(chunks))


def _check_cover(key: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Raises DamagedError unless the chunks cover the shape, each element once."""
    cuts = []
    for axis, size in enumerate(shape):
        begins = {chunk.offsets[axis] for chunk in chunks}
        cuts.append(sorted({0, size} | begins | {chunk.offsets[axis] + chunk.sizes[axis] for chunk in chunks}))
    cells = [max(len(places) - 1, 1) for places in cuts]
    if math.prod(cells) > _MOST_CELLS:
        raise DamagedError(f"{key} is cut in a way that no layout cuts")
    index = [{place: number for number, place in enumerate(places)} for places in cuts]
    count = np.zeros(cells, dtype=np.int32)
    for chunk in chunks:
        if 0 not in chunk.sizes:
            spans = zip(index, chunk.offsets, chunk.sizes, strict=True)
            count[tuple(slice(at[start], at[start + size]) for at, start, size in spans)] += 1
    if 0 not in shape and (count != 1).any():
        problem = "overlap" if (count > 1).any() else "leave gaps"
        raise DamagedError(f"the chunks of {key} {problem}")
