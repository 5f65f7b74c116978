"""Files of tensors that are written a few rows at a time, by several threads at once.

A file gets its whole size and every tensor its place before the first byte is written. Rows are appended to a tensor;
a file is finished (checksums, sync) as soon as its last row is there, while others are still written.

All has to be on disk at the end, so the kernel is asked to begin with every few megabytes at once. It gets them in
small pieces, and may use the memory of what is on disk again: large or much free memory is what the host of a virtual
machine may first have to find.
"""

import ctypes
import errno
import json
import math
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.core.atomic_files import naming
from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.stored_tensor import bytes_of
from tools.checkpoint.safetensors_header import DTYPE_NAMES
from tools.checkpoint.stream import ThreadBuffer

_PIECE = 256 << 10
_KEPT = 16 << 20  # bytes of a file that stay in memory until they are on disk


@dataclass(frozen=True)
class TensorPlan:
    """Name, shape and type of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * STORED_AS[self.dtype].itemsize


@dataclass
class Place:
    """A tensor's place in its file, and how far it has been written."""

    plan: TensorPlan
    offset: int
    done: int = 0
    checksum: int = 0


class TensorFile(ABC):
    """A file whose tensors are appended to in any order; the rows of one tensor by one thread, in their order.

    Raises ValueError if a tensor is not planned, is of another type or row shape, or gets more rows than it has.
    """

    def __init__(self, path: Path, places: Iterable[Place], size: int) -> None:
        self.path = path
        self.places = {place.plan.name: place for place in places}
        self._lock = threading.Lock()
        self._left = sum(place.plan.nbytes for place in self.places.values())
        self._synced: Future[None] | None = None
        with naming(path), open(path, "wb") as file:
            _reserve(file.fileno(), size)

    def append(self, name: str, rows: Array) -> None:
        """Adds rows to the tensor `name`."""
        place = self.places.get(name)
        if place is None:
            raise ValueError(f"{self.path.name} has no place for {name}")
        if rows.dtype != STORED_AS[place.plan.dtype] or rows.shape[1:] != place.plan.shape[1:]:
            raise ValueError(f"expected rows of {place.plan} but got {rows.shape}, {rows.dtype}")
        if place.done + rows.nbytes > place.plan.nbytes:
            raise ValueError(f"{name} in {self.path} is written twice")
        if not rows.flags.c_contiguous:
            gathered = _buffers.array(rows.shape, rows.dtype)
            np.copyto(gathered, rows)
            rows = gathered
        data = bytes_of(rows)
        self._write(data, place.offset + place.done)
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

    def _write(self, data: memoryview, offset: int) -> None:
        with (
            naming(self.path),
            self._lock,  # the kernel's own lock would be waited for busily
            open(self.path, "r+b", buffering=0) as file,
        ):
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done : done + _PIECE], offset + done)
            _begin_sync(file.fileno(), offset, len(data))


_buffers = ThreadBuffer()
# Threads that wait for the disk, so that those that move rows do not have to.
_syncing = ThreadPoolExecutor(8, thread_name_prefix="sync")


def _sync(path: Path) -> None:
    with naming(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def _linux_call(name: str, *kinds: type) -> Callable[..., int]:
    """A function of Linux's C library, or one that fails."""
    found = getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None
    if found is None:
        return lambda *_: -1
    found.argtypes = kinds
    return found  # type: ignore[no-any-return]


_fallocate = _linux_call("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range = _linux_call("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _begin_sync(descriptor: int, offset: int, size: int) -> None:
    """Lets the kernel begin to write these bytes to the disk, and use the memory of earlier ones again.

    Where that is not possible, only time is lost.
    """
    _sync_file_range(descriptor, offset, size, 2)  # SYNC_FILE_RANGE_WRITE
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, max(offset - _KEPT, 0), size, os.POSIX_FADV_DONTNEED)


def _reserve(descriptor: int, size: int) -> None:
    """Gives an empty file its size, and room on the disk where the file system can find it at once.

    `os.posix_fallocate` would write every block where it cannot.
    """
    ctypes.set_errno(0)
    if _fallocate(descriptor, 0, 0, size) == 0:
        return
    if ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(descriptor, size)


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path: Path, plan: Sequence[TensorPlan]) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, offset = [], 0
        for tensor in plan:
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            places.append(Place(tensor, offset))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(8 + len(text)) % 64)  # as `.pt` files are: what is copied to odd addresses takes longer
        for place in places:
            place.offset += 8 + len(text)
        super().__init__(path, places, 8 + len(text) + offset)
        self._write(memoryview(len(text).to_bytes(8, "little") + text), 0)

    def _finish(self) -> None:
        """Nothing is left to write."""


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
