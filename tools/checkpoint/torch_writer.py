"""`.pt` files, as `torch.save` writes them, a few rows at a time and without torch.

A `.pt` file is a zip archive without compression: a pickle that describes the tensors, and a record for each tensor's
bytes. Checksums stand before and behind the records, and are written when all rows are there. The `.distcp` files of
distributed checkpoints are such archives one after the other, each of one tensor.
"""

import itertools
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.interchange.torch_pickle import TensorEntry, write_pickle
from tools.checkpoint.writers import Place, TensorFile, TensorPlan

_DATE = (1 << 5) | 1  # 1 January 1980, as everywhere where no time is meant


class _Record(NamedTuple):
    name: bytes
    header: int
    """Offset of what stands before its bytes."""
    start: int
    nbytes: int
    place: Place | None
    """Of the tensor whose bytes it has."""
    content: bytes
    """Its bytes, if it is not a tensor's."""

    @property
    def checksum(self) -> int:
        """CRC-32, as zip files have it."""
        return zlib.crc32(self.content) if self.place is None else self.place.checksum

    def local_header(self) -> bytes:
        """What stands before its bytes, the checksum among it; padded so that they begin at `start`."""
        extra = b""
        sizes = (self.nbytes, self.nbytes)
        if self.nbytes >= 1 << 32:
            extra, sizes = struct.pack("<HHQQ", 1, 16, *sizes), (0xFFFFFFFF, 0xFFFFFFFF)
        padding = self.start - self.header - 30 - len(self.name) - len(extra) - 4
        extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
        fields = (45, 0, 0, 0, _DATE, self.checksum, *sizes, len(self.name), len(extra))
        return struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields) + self.name + extra

    def directory_entry(self) -> bytes:
        """Its line in the archive's directory."""
        numbers = [self.nbytes, self.nbytes, self.header]
        large = [number for number in numbers if number >= 0xFFFFFFFF]
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        sizes = [min(number, 0xFFFFFFFF) for number in numbers]
        fields = (45, 45, 0, 0, 0, _DATE, self.checksum, *sizes[:2], len(self.name), len(extra), 0, 0, 0, 0, sizes[2])
        return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", *fields) + self.name + extra


class _Archive:
    """The records of a `.pt` file that begins at `start`, laid out in their order."""

    def __init__(self, name: str, start: int = 0) -> None:
        self._name, self._start = name, start
        self._records: list[_Record] = []
        self._end = 0

    def add(self, name: str, content: bytes | TensorPlan) -> None:
        """Gives a record its place."""
        full = f"{self._name}/{name}".encode()
        nbytes = content.nbytes if isinstance(content, TensorPlan) else len(content)
        least = self._end + 30 + len(full) + 4 + (20 if nbytes >= 1 << 32 else 0)
        start = -(-least // 64) * 64
        place = Place(content, self._start + start) if isinstance(content, TensorPlan) else None
        kept = content if isinstance(content, bytes) else b""
        self._records.append(_Record(full, self._end, start, nbytes, place, kept))
        self._end = start + nbytes

    @property
    def places(self) -> list[Place]:
        """Those of tensors, in the file."""
        return [record.place for record in self._records if record.place is not None]

    @property
    def size(self) -> int:
        """Bytes of the archive, its directory included."""
        return self._end + sum(len(record.directory_entry()) for record in self._records) + 56 + 20 + 22

    def finished(self) -> Iterator[tuple[int, bytes]]:
        """What stands around the tensors' bytes, each with its place in the file, once their checksums are known."""
        for record in self._records:
            yield self._start + record.header, record.local_header() + record.content
        directory = b"".join(record.directory_entry() for record in self._records)
        count, size, end = len(self._records), len(directory), self._end
        large = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, end)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end + size, 1)
        counts = (min(count, 0xFFFF),) * 2
        last = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *counts, min(size, 0xFFFFFFFF), min(end, 0xFFFFFFFF), 0)
        yield self._start + end, directory + large + locator + last


class _ArchiveFile(TensorFile):
    """A file of archives, whose checksums are written at the end."""

    def __init__(self, path: Path, archives: Sequence[_Archive], size: int) -> None:
        self._archives = archives
        super().__init__(path, (place for archive in archives for place in archive.places), size)

    def checksum(self, data: memoryview, start: int) -> int:
        """CRC-32, as zip files have it."""
        return zlib.crc32(data, start)

    def _finish(self) -> None:
        """Writes what stands before the records, the directory and the end of each archive."""
        for archive in self._archives:
            for offset, content in archive.finished():
                self._write(memoryview(content), offset)


def _entry(record: str, plan: TensorPlan) -> TensorEntry:
    strides = tuple(math.prod(plan.shape[axis + 1 :]) for axis in range(len(plan.shape)))
    return TensorEntry(record, plan.dtype, plan.shape, strides)


class TorchFile(_ArchiveFile):
    """A `.pt` file that holds `content`, plain values, and dictionaries of tensors under further keys."""

    def __init__(self, path: Path, content: dict[str, Any], keys: Mapping[str, Sequence[TensorPlan]]) -> None:
        numbers = itertools.count()
        described = {key: {plan.name: _entry(f"data/{next(numbers)}", plan) for plan in keys[key]} for key in keys}
        archive = _Archive(path.stem)
        archive.add("data.pkl", write_pickle({**content, **described}))
        archive.add("byteorder", b"little")
        for key, plans in keys.items():
            for plan in plans:
                archive.add(described[key][plan.name].record, replace(plan, name=f"{key}/{plan.name}"))
        archive.add("version", b"3\n")
        super().__init__(path, [archive], archive.size)


def torch_bytes(value: object) -> bytes:
    """What `torch.save` writes of plain values."""
    archive = _Archive("archive")
    archive.add("data.pkl", write_pickle(value))
    archive.add("byteorder", b"little")
    archive.add("version", b"3\n")
    content = bytearray(archive.size)
    for offset, part in archive.finished():
        content[offset : offset + len(part)] = part
    return bytes(content)


class ChunksFile(_ArchiveFile):
    """A `.distcp` file: tensors, each an archive of its own, and objects as `torch.save` writes them.

    With a tensor comes how many axes of size one it has in front of those that it is filled by.
    """

    def __init__(self, path: Path, plans: Sequence[tuple[TensorPlan, int]], objects: Mapping[str, bytes]) -> None:
        archives, self.extents, end = [], dict[str, tuple[int, int]](), 0
        for plan, axes in plans:
            archive = _Archive("archive", end)
            stored = replace(plan, shape=(1,) * axes + plan.shape)
            archive.add("data.pkl", write_pickle(_entry("data/0", stored)))
            archive.add("byteorder", b"little")
            archive.add("data/0", plan)
            archive.add("version", b"3\n")
            archives.append(archive)
            self.extents[plan.name] = (end, archive.size)
            """Offset and length of what each name stands for."""
            end += archive.size
        places = {}
        for name, content in objects.items():
            places[name] = self.extents[name] = (end, len(content))
            end += len(content)
        super().__init__(path, archives, end)
        for name, content in objects.items():
            self._write(memoryview(content), places[name][0])
