"""Files of tensors that are written a few rows at a time, by several threads at once.

A file gets its whole size and every tensor its place before the first byte is written. Rows are appended to a tensor;
a file is finished (checksums, sync) as soon as its last row is there, while others are still written.
"""

import json
import os
import struct
import sys
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.core.interchange.torch_file import index_torch

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


@dataclass
class _Place:
    """A tensor's place in its file, and how far it has been written."""

    plan: TensorPlan
    offset: int
    done: int = 0
    checksum: int = 0


class TensorFile(ABC):
    """A file whose tensors are appended to in any order; the rows of one tensor by one thread, in their order.

    Raises ValueError if a tensor is not planned, is of another type or row shape, or gets more rows than it has.
    """

    def __init__(self, path: Path, places: Iterable[_Place]) -> None:
        self.path = path
        self.places = {place.plan.name: place for place in places}
        self._lock = threading.Lock()
        self._left = sum(place.plan.nbytes for place in self.places.values())
        self._synced: Future[None] | None = None

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Adds rows to the tensor `name`."""
        place = self.places.get(name)
        if place is None:
            raise ValueError(f"{self.path.name} has no place for {name}")
        if rows.dtype != place.plan.dtype or tuple(rows.shape[1:]) != place.plan.shape[1:]:
            raise ValueError(f"expected rows of {place.plan} but got {tuple(rows.shape)}, {rows.dtype}")
        data = memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        if place.done + len(data) > place.plan.nbytes:
            raise ValueError(f"{name} in {self.path} is written twice")
        with (
            self._lock,
            open(self.path, "r+b", buffering=0) as file,
        ):  # the kernel's own lock would be waited for busily
            _write(file.fileno(), data, place.offset + place.done, self.path)
        place.checksum = self.checksum(data, place.checksum)
        place.done += len(data)
        with self._lock:
            self._left -= len(data)
            complete = self._left == 0
        if complete:
            self._finish()
            self._synced = _syncing.submit(_sync, self.path)

    def check_complete(self) -> None:
        """Waits until all is on disk. Raises ValueError naming a tensor of which not every row was written."""
        for place in self.places.values():
            if place.done != place.plan.nbytes:
                raise ValueError(
                    f"{place.plan.name} in {self.path} was not written completely: {place.done} of "
                    f"{place.plan.nbytes} bytes"
                )
        if self._synced is not None:
            self._synced.result()

    def checksum(self, data: memoryview, start: int) -> int:
        """The checksum after `data`, for formats that have one."""
        return 0

    @abstractmethod
    def _finish(self) -> None:
        """Writes what can only be known at the end."""


# Threads that wait for the disk, so that those that move rows do not have to.
_syncing = ThreadPoolExecutor(8, thread_name_prefix="sync")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], offset + done)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which file it was
        raise


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path: Path, plan: Sequence[TensorPlan]) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, offset = [], 0
        for tensor in plan:
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            places.append(_Place(tensor, offset))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(8 + len(text)) % 64)  # as `.pt` files are: what is copied to odd addresses takes longer
        for place in places:
            place.offset += 8 + len(text)
        super().__init__(path, places)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + offset)

    def _finish(self) -> None:
        """Nothing is left to write."""


class TorchFile(TensorFile):
    """A `.pt` file as `torch.save` writes it: `content`, and dictionaries of tensors under further keys."""

    def __init__(self, path: Path, content: dict[str, Any], keys: Mapping[str, Sequence[TensorPlan]]) -> None:
        tensors = {key: {plan.name: torch.empty(plan.shape, dtype=plan.dtype) for plan in keys[key]} for key in keys}
        try:
            with torch.serialization.skip_data():  # the tensors' memory is neither touched nor written
                torch.save({**content, **tensors}, path)
        except RuntimeError as error:  # torch's zip writer reports a failed write this way
            reason = str(error).split("\n")[0]
            raise OSError(f"cannot write {path}: the disk may be full or have failed ({reason})") from error
        written = index_torch(path)
        super().__init__(
            path,
            (
                _Place(
                    TensorPlan(f"{key}/{plan.name}", plan.shape, plan.dtype),
                    written[key][plan.name].untyped_storage()._checkpoint_offset,
                )
                for key, plans in keys.items()
                for plan in plans
            ),
        )

    def checksum(self, data: memoryview, start: int) -> int:
        """CRC-32, as zip files have it."""
        return zlib.crc32(data, start)

    def _finish(self) -> None:
        """Writes the records' checksums: behind each record, and in the archive's directory."""
        checksums = {place.offset: (place.checksum, place.plan.nbytes) for place in self.places.values()}
        with zipfile.ZipFile(self.path) as archive:
            position = archive.start_dir
        with open(self.path, "r+b", buffering=0) as file:
            descriptor = file.fileno()
            while (entry := os.pread(descriptor, 46, position))[:4] == b"PK\x01\x02":
                lengths = struct.unpack("<HHH", entry[28:34])
                header = self._header_offset(descriptor, entry, position)
                name_length, extra_length = struct.unpack("<HH", os.pread(descriptor, 4, header + 26))
                data = header + 30 + name_length + extra_length
                if data in checksums:
                    checksum, nbytes = checksums.pop(data)
                    packed = struct.pack("<I", checksum)
                    _write(descriptor, memoryview(packed), position + 16, self.path)
                    assert os.pread(descriptor, 4, data + nbytes) == b"PK\x07\x08", "no data descriptor"
                    _write(descriptor, memoryview(packed), data + nbytes + 4, self.path)
                position += 46 + sum(lengths)
        assert not checksums, f"{self.path} has no records for {len(checksums)} of its tensors"

    @staticmethod
    def _header_offset(descriptor: int, entry: bytes, position: int) -> int:
        """Offset of a record's local header; beyond 4 GB it is in the last field of the entry's zip64 extra data."""
        compressed, size, name_length, extra_length, offset = struct.unpack("<20xIIHH10xI", entry)
        if offset != 0xFFFFFFFF:
            return int(offset)
        extra = os.pread(descriptor, extra_length, position + 46 + name_length)
        start = 0
        while struct.unpack_from("<H", extra, start)[0] != 1:
            start += 4 + struct.unpack_from("<H", extra, start + 2)[0]
        start += 4 + 8 * (size == 0xFFFFFFFF) + 8 * (compressed == 0xFFFFFFFF)
        return int(struct.unpack_from("<Q", extra, start)[0])


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
