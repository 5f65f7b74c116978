"""Tensors in files, read a few rows at a time into memory of just that size.

Nothing is mapped into memory: pages of a mapped file count as the process's own, and a model is larger than the memory
of the machines that convert it.
"""

import math
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.interchange.element_types import STORED_AS, Array, cast, dtype_name, from_torch
from megatron.core.interchange.torch_archive import Record, Window, is_archive
from megatron.core.interchange.torch_file import archive_records, index_torch
from megatron.core.interchange.torch_pickle import TensorEntry

_BLOCK = 1 << 22


def _fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"cannot read {path}: it is cut short; restore the file from its source")
        done += count


def bytes_of(array: Array) -> memoryview:
    """The memory of an array that has no gaps."""
    return memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


class ZipRecords:
    """The records of a `.pt` file, or of a `window` of one, by the offset of their bytes.

    Each is compared with its checksum once.
    """

    def __init__(self, path: Path, window: Window | None = None) -> None:
        self.path = path
        self._named = archive_records(path, window)
        self._records = {record.start: record for record in self._named.values() if record.size}
        self._good: set[int] = set()
        self._verifying: dict[int, threading.Lock] = {}
        self._running: dict[int, tuple[int, int]] = {}
        """Bytes of a record that were read in their order, and their checksum."""

    def start(self, name: str) -> int:
        """Where the bytes of the record `name` begin. Raises ValueError if there is none."""
        if name not in self._named:
            raise ValueError(f"cannot read {self.path}: it has no record {name}; restore the file from its source")
        return self._named[name].start

    def checksum(self, offset: int, nbytes: int) -> int | None:
        """The stored checksum of the `nbytes` bytes at `offset`, None if they are only a part of a record."""
        record = self._records.get(offset)
        return record.checksum if record is not None and record.size == nbytes else None

    def verify(self, offset: int) -> None:
        """Raises ValueError if the record that begins at `offset` is not what was written.

        Of threads that ask for the same one, which may hold a weight of all layers, the first reads it.
        """
        with self._verifying.setdefault(offset, threading.Lock()):
            record = self._records.get(offset)
            if record is None or offset in self._good:  # no record: one of no bytes
                return
            self._compare(offset, self._sum(record))

    def _sum(self, record: Record) -> int:
        found, view = 0, memoryview(bytearray(min(_BLOCK, record.size)))
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, record.size, _BLOCK):
                part = view[: min(_BLOCK, record.size - start)]
                _fill(file.fileno(), part, record.start + start, self.path)
                found = zlib.crc32(part, found)
        return found

    def verify_next(self, offset: int, start: int, data: memoryview) -> None:
        """Raises ValueError if `data`, read from byte `start` of a record, ends it and the record is damaged.

        Bytes that do not continue those of the last call cannot extend it: the whole record is read again.
        """
        if offset in self._good:
            return
        done, found = self._running.get(offset, (0, 0)) if start else (0, 0)
        if done != start:
            return self.verify(offset)
        done, found = done + len(data), zlib.crc32(data, found)
        self._running[offset] = (done, found)
        if done == self._records[offset].size:
            self._compare(offset, found)

    def _compare(self, offset: int, found: int) -> None:
        record = self._records[offset]
        if found != record.checksum:
            raise ValueError(
                f"cannot read {self.path}: the checksum of {record.name} does not match; restore the file from its "
                "source"
            )
        self._good.add(offset)


class _LastWhole(threading.local):
    """The tensor not stored row by row that this thread last read."""

    key: object = None
    array: Array = np.empty(0)


_last_whole = _LastWhole()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is and where its bytes are."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Of its first element, in bytes."""
    stride: tuple[int, ...] | None = None
    """In elements; None if it is stored row by row, without gaps."""
    records: ZipRecords | None = field(default=None, compare=False)
    record_offset: int = 0
    """Where the zip record with its bytes begins."""

    @property
    def checksum(self) -> int | None:
        """The stored checksum of exactly its bytes, if there is one: equal tensors have equal ones."""
        if self.records is None or self.stride is not None or self.offset != self.record_offset:
            return None
        return self.records.checksum(self.offset, math.prod(self.shape) * STORED_AS[self.dtype].itemsize)

    def read(self, rows: range | None = None) -> Array:
        """`rows` of the tensor (all, if not given) in its own type. Raises ValueError naming the file if it is damaged.

        Its checksum is compared before the first rows are given: one more pass over it.
        """
        rows = range(self.shape[0]) if rows is None else rows
        array = np.empty((len(rows), *self.shape[1:]), STORED_AS[self.dtype])
        self.read_into(array, rows, self.dtype)
        return array

    def read_into(self, target: Array, rows: range, dtype: str, *, in_order: bool = False) -> None:
        """Fills `target`, of whatever shape, with `rows` of the tensor as elements of type `dtype`.

        Who reads every row once, in their order, and uses none before all are there, says `in_order`; then the
        checksum is compared with the last rows, without another pass.
        """
        in_order = in_order and self.checksum is not None
        if self.records is not None and not in_order:
            self.records.verify(self.record_offset)
        if self.stride is not None:
            whole = self._read_strided(self.stride)
            target[...] = cast(whole[rows.start : rows.stop], self.dtype, dtype).reshape(target.shape)
            return
        direct = dtype == self.dtype and target.flags.c_contiguous
        array = target if direct else np.empty((len(rows), *self.shape[1:]), STORED_AS[self.dtype])
        skip = math.prod(self.shape[1:]) * array.itemsize * rows.start
        self._fill(array, skip)
        if self.records is not None and in_order:
            self.records.verify_next(self.offset, skip, bytes_of(array))
        if not direct:
            target[...] = cast(array, self.dtype, dtype).reshape(target.shape)

    def _fill(self, array: Array, skip: int = 0) -> None:
        with open(self.file, "rb", buffering=0) as file:
            _fill(file.fileno(), bytes_of(array), self.offset + skip, self.file)

    def _read_strided(self, stride: tuple[int, ...]) -> Array:
        """The whole tensor, since its rows lie scattered; kept until the thread reads another one."""
        key = (self.file, self.offset, self.shape, stride)
        if _last_whole.key != key:
            span = 1 + sum((length - 1) * step for length, step in zip(self.shape, stride, strict=True))
            _last_whole.key, _last_whole.array = None, np.empty(0)
            memory = np.empty(span, STORED_AS[self.dtype])
            self._fill(memory)
            steps = [step * memory.itemsize for step in stride]
            _last_whole.array = np.ascontiguousarray(np.lib.stride_tricks.as_strided(memory, self.shape, steps))
            _last_whole.key = key
        return _last_whole.array


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a file of before torch 1.6, which can only be read as a whole."""

    file: Path
    dtype: str
    array: Array
    checksum: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape

    def read(self, rows: range | None = None) -> Array:
        """`rows` of the tensor (all, if not given)."""
        return np.ascontiguousarray(self.array if rows is None else self.array[rows.start : rows.stop])

    def read_into(self, target: Array, rows: range, dtype: str, *, in_order: bool = False) -> None:
        """Fills `target`, of whatever shape, with `rows` of the tensor as elements of type `dtype`."""
        target[...] = cast(self.read(rows), self.dtype, dtype).reshape(target.shape)


def open_torch(path: Path) -> tuple[dict[str, Any], ZipRecords | None]:
    """The content of a `.pt` file without the tensors' bytes, and its records; see `stored_tensor`.

    Raises ValueError naming the file if it is damaged or holds anything that would run code.
    """
    content = index_torch(path)
    return content, ZipRecords(path) if is_archive(path) else None


def stored_tensor(path: Path, records: ZipRecords | None, name: str, value: Any) -> StoredTensor | LoadedTensor:
    """Where the bytes of `value`, the tensor `name` of `open_torch`'s content, are.

    Raises ValueError if it is not a tensor of floating-point numbers.
    """
    is_tensor = isinstance(value, TensorEntry) if records is not None else hasattr(value, "untyped_storage")
    if not is_tensor:
        raise ValueError(f"{path}: {name} is not a tensor")
    dtype = value.dtype if isinstance(value, TensorEntry) else dtype_name(value.dtype)
    if dtype not in STORED_AS:
        raise ValueError(f"{path}: {name} is of type {dtype}: only {', '.join(STORED_AS)} are supported")
    if not isinstance(value, TensorEntry) or records is None:
        return LoadedTensor(path, dtype, from_torch(value))
    start = records.start(value.record)
    steps = [math.prod(value.shape[number + 1 :]) for number in range(len(value.shape))]
    whole = all(size == 1 or step == own for size, step, own in zip(value.shape, value.stride, steps, strict=True))
    offset = start + value.start * STORED_AS[dtype].itemsize
    return StoredTensor(path, value.shape, dtype, offset, None if whole else value.stride, records, start)
