"""`.pt` files, as `torch.save` writes them, a few rows at a time and without torch.

A `.pt` file is a zip archive without compression: a pickle that describes the tensors, and a record for each tensor's
bytes. Checksums stand before and behind the records, and are written when all rows are there.
"""

import itertools
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
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


class TorchFile(TensorFile):
    """A `.pt` file that holds `content`, plain values, and dictionaries of tensors under further keys."""

    def __init__(self, path: Path, content: dict[str, Any], keys: Mapping[str, Sequence[TensorPlan]]) -> None:
        self._records: list[_Record] = []
        self._end = 0
        numbers = itertools.count()
        described: dict[str, dict[str, TensorEntry]] = {key: {} for key in keys}
        for key, plans in keys.items():
            for plan in plans:
                strides = tuple(math.prod(plan.shape[axis + 1 :]) for axis in range(len(plan.shape)))
                described[key][plan.name] = TensorEntry(f"data/{next(numbers)}", plan.dtype, plan.shape, strides)
        self._add(path, "data.pkl", write_pickle({**content, **described}))
        self._add(path, "byteorder", b"little")
        for key, plans in keys.items():
            for plan in plans:
                named = TensorPlan(f"{key}/{plan.name}", plan.shape, plan.dtype)
                self._add(path, described[key][plan.name].record, named)
        self._add(path, "version", b"3\n")
        directory = sum(len(record.directory_entry()) for record in self._records)
        places = (record.place for record in self._records if record.place is not None)
        super().__init__(path, places, self._end + directory + 56 + 20 + 22)

    def _add(self, path: Path, name: str, content: bytes | TensorPlan) -> None:
        full = f"{path.stem}/{name}".encode()
        nbytes = content.nbytes if isinstance(content, TensorPlan) else len(content)
        least = self._end + 30 + len(full) + 4 + (20 if nbytes >= 1 << 32 else 0)
        start = -(-least // 64) * 64
        place = Place(content, start) if isinstance(content, TensorPlan) else None
        kept = content if isinstance(content, bytes) else b""
        self._records.append(_Record(full, self._end, start, nbytes, place, kept))
        self._end = start + nbytes

    def checksum(self, data: memoryview, start: int) -> int:
        """CRC-32, as zip files have it."""
        return zlib.crc32(data, start)

    def _finish(self) -> None:
        """Writes what stands before the records, the directory and the end of the archive."""
        for record in self._records:
            self._write(memoryview(record.local_header() + record.content), record.header)
        directory = b"".join(record.directory_entry() for record in self._records)
        count, size, end = len(self._records), len(directory), self._end
        large = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, end)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, end + size, 1)
        counts = (min(count, 0xFFFF),) * 2
        last = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *counts, min(size, 0xFFFFFFFF), min(end, 0xFFFFFFFF), 0)
        self._write(memoryview(directory + large + locator + last), end)
