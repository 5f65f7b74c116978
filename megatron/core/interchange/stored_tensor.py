"""Tensors in files, read a few rows at a time into memory of just that size.

Nothing is mapped into memory: pages of a mapped file count as the process's own, and a model is larger than the memory
of the machines that convert it.
"""

import os
import struct
import threading
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.core.interchange.torch_file import index_torch

_BLOCK = 1 << 22


def _fill(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"cannot read {path}: it is cut short; restore the file from its source")
        done += count


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


class ZipRecords:
    """The records of a `.pt` file, by the offset of their bytes, each compared with its checksum once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[int, zipfile.ZipInfo] = {}
        self._good: set[int] = set()
        self._running: dict[int, tuple[int, int]] = {}
        """Bytes of a record that were read in their order, and their checksum."""
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                file.seek(info.header_offset + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                self._records[info.header_offset + 30 + name_length + extra_length] = info

    def checksum(self, offset: int, nbytes: int) -> int | None:
        """The stored checksum of the `nbytes` bytes at `offset`, None if they are only a part of a record."""
        info = self._records.get(offset)
        return info.CRC if info is not None and info.file_size == nbytes else None

    def verify(self, offset: int) -> None:
        """Raises ValueError if the record that begins at `offset` is not what was written."""
        if offset in self._good:
            return
        info = self._records.get(offset)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"cannot read {self.path}: it is damaged or cut short; restore the file from its source")
        found, view = 0, memoryview(bytearray(min(_BLOCK, info.file_size)))
        with open(self.path, "rb", buffering=0) as file:
            for start in range(0, info.file_size, _BLOCK):
                part = view[: min(_BLOCK, info.file_size - start)]
                _fill(file.fileno(), part, offset + start, self.path)
                found = zlib.crc32(part, found)
        self._compare(offset, found)

    def verify_next(self, offset: int, start: int, data: memoryview) -> None:
        """Raises ValueError if `data`, read from byte `start` of a record, ends it and the record is damaged.

        Bytes that do not follow on those of the last call are no use for that: the whole record is read again.
        """
        if offset in self._good:
            return
        done, found = self._running.get(offset, (0, 0)) if start else (0, 0)
        if done != start:
            return self.verify(offset)
        done, found = done + len(data), zlib.crc32(data, found)
        self._running[offset] = (done, found)
        if done == self._records[offset].file_size:
            self._compare(offset, found)

    def _compare(self, offset: int, found: int) -> None:
        info = self._records[offset]
        if found != info.CRC:
            raise ValueError(
                f"cannot read {self.path}: the checksum of {info.filename} does not match; restore the file from its "
                "source"
            )
        self._good.add(offset)


class _LastWhole(threading.local):
    """The tensor not stored row by row that this thread last read."""

    key: object = None
    tensor: torch.Tensor = torch.empty(0)


_last_whole = _LastWhole()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what it is and where its bytes are."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Of its first element, in bytes."""
    stride: tuple[int, ...] | None = None
    """In elements; None if it is stored row by row, without gaps."""
    records: ZipRecords | None = field(default=None, compare=False)
    record_offset: int = 0
    """Where the zip record with its bytes begins."""

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def checksum(self) -> int | None:
        """The stored checksum of exactly its bytes, if there is one: equal tensors have equal ones."""
        if self.records is None or self.stride is not None or self.offset != self.record_offset:
            return None
        return self.records.checksum(self.offset, self.nbytes)

    def read(self, rows: range | None = None, *, in_order: bool = False) -> torch.Tensor:
        """`rows` of the tensor (all, if not given). Raises ValueError naming the file if it is damaged.

        Its checksum is compared before the first rows are given: one more pass over it. Who reads every row once, in
        their order, and uses none before all are there, says `in_order`; then it is compared with the last rows.
        """
        in_order = in_order and self.checksum is not None
        if self.records is not None and not in_order:
            self.records.verify(self.record_offset)
        if self.stride is not None:
            whole = self._read_strided(self.stride)
            return whole if rows is None else whole[rows.start : rows.stop]
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        skip = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize * (rows.start if rows else 0)
        tensor = self._read_flat(torch.Size(shape).numel(), skip)
        if self.records is not None and in_order:
            self.records.verify_next(self.offset, skip, _bytes(tensor))
        return tensor.reshape(shape)

    def _read_flat(self, elements: int, skip: int = 0) -> torch.Tensor:
        tensor = torch.empty(elements, dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as file:
            _fill(file.fileno(), _bytes(tensor), self.offset + skip, self.file)
        return tensor

    def _read_strided(self, stride: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor, since its rows lie scattered; kept until the thread reads another one."""
        key = (self.file, self.offset, self.shape, stride)
        if _last_whole.key != key:
            span = 1 + sum((length - 1) * step for length, step in zip(self.shape, stride, strict=True))
            _last_whole.key, _last_whole.tensor = None, torch.empty(0)
            _last_whole.tensor = self._read_flat(span).as_strided(self.shape, stride).contiguous()
            _last_whole.key = key
        return _last_whole.tensor


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor of a file of before torch 1.6, which can only be read as a whole."""

    file: Path
    tensor: torch.Tensor
    checksum: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.tensor.dtype

    def read(self, rows: range | None = None, *, in_order: bool = False) -> torch.Tensor:
        """`rows` of the tensor (all, if not given)."""
        return (self.tensor if rows is None else self.tensor[rows.start : rows.stop]).contiguous()


def open_torch(path: Path) -> tuple[dict[str, Any], ZipRecords | None]:
    """The content of a `.pt` file without the tensors' bytes, and its records; see `stored_tensor`.

    Raises ValueError naming the file if it is damaged or holds anything that would run code.
    """
    content = index_torch(path)
    return content, ZipRecords(path) if zipfile.is_zipfile(path) else None


def stored_tensor(path: Path, records: ZipRecords | None, tensor: torch.Tensor) -> StoredTensor | LoadedTensor:
    """Where the bytes of a tensor of `open_torch`'s content are."""
    if records is None:
        return LoadedTensor(path, tensor)
    start: int = tensor.untyped_storage()._checkpoint_offset  # type: ignore[assignment]
    offset = start + int(tensor.storage_offset()) * tensor.dtype.itemsize
    stride = None if tensor.is_contiguous() else tuple(tensor.stride())
    return StoredTensor(path, tuple(tensor.shape), tensor.dtype, offset, stride, records, start)
