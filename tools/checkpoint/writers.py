"""Files of tensors that are written a few rows at a time, by several threads at once.

A file gets its whole size and every tensor its place before the first byte is written. Rows are appended to a tensor;
a file is finished (checksums, sync) as soon as its last row is there, while others are still written.

Whole pages go from the thread's memory straight to the disk where the file system can do that (`O_DIRECT`): all has to
be on disk at the end anyway, several writes keep the disk busy, and neither memory for a copy of the output is needed
nor the time to find and fill it. What does not fill pages is written the ordinary way.
"""

import ctypes
import errno
import json
import math
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.stored_tensor import bytes_of
from tools.checkpoint.hf_files import SAFETENSORS_NAMES
from tools.checkpoint.stream import PAGE, ThreadBuffer


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
        with open(path, "wb") as file:
            _reserve(file.fileno(), size, path)
        self._direct = _opens_directly(path)

    def append(self, name: str, rows: Array) -> None:
        """Adds rows to the tensor `name`."""
        place = self.places.get(name)
        if place is None:
            raise ValueError(f"{self.path.name} has no place for {name}")
        if rows.dtype != STORED_AS[place.plan.dtype] or rows.shape[1:] != place.plan.shape[1:]:
            raise ValueError(f"expected rows of {place.plan} but got {rows.shape}, {rows.dtype}")
        if place.done + rows.nbytes > place.plan.nbytes:
            raise ValueError(f"{name} in {self.path} is written twice")
        offset = place.offset + place.done
        direct = self._direct and offset % PAGE == rows.nbytes % PAGE == 0
        if not rows.flags.c_contiguous or (direct and rows.__array_interface__["data"][0] % PAGE):
            aligned = _buffers.array(rows.shape, rows.dtype)
            np.copyto(aligned, rows)
            rows = aligned
        data = bytes_of(rows)
        if direct:
            self._write(data, offset, os.O_DIRECT)
        else:
            with self._lock:  # the kernel's own lock would be waited for busily
                self._write(data, offset)
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

    def _write(self, data: memoryview, offset: int, flags: int = 0) -> None:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | flags)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], offset + done)
            finally:
                os.close(descriptor)
        except OSError as error:
            if flags and error.errno == errno.EINVAL:  # a device that wants other alignment
                return self._write(data, offset)
            error.filename = str(self.path)  # a full disk does not say which file it was
            raise


_buffers = ThreadBuffer()
# Threads that wait for the disk, so that those that move rows do not have to.
_syncing = ThreadPoolExecutor(8, thread_name_prefix="sync")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _opens_directly(path: Path) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Gives an empty file its size, and room on the disk where the file system can find it at once.

    `os.posix_fallocate` would write every block where it cannot.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is not None and size:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(descriptor, 0, 0, size) == 0:
            return
        if ctypes.get_errno() == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.ftruncate(descriptor, size)


class SafetensorsFile(TensorFile):
    """A safetensors file. Tensors that do not fill pages come last, so that the others begin where a page does."""

    def __init__(self, path: Path, plan: Sequence[TensorPlan]) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, offset = [], 0
        for tensor in sorted(plan, key=lambda tensor: tensor.nbytes % PAGE != 0):
            end = offset + tensor.nbytes
            header[tensor.name] = {
                "dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
            }  # fmt: skip
            places.append(Place(tensor, offset))
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-(8 + len(text)) % PAGE)
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
