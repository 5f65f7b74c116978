"""The archive that a `.pt` file is: its directory, checked before anything in it is read."""

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_RECORD_HEADER = b"PK\x03\x04"


class DamagedError(ValueError):
    """The content of a file is not what was written."""


@dataclass(frozen=True)
class Record:
    """Bytes in a file, stored as they are."""

    name: str
    """With the archive's own name in front: `model/data/0`."""
    start: int
    size: int
    checksum: int
    """CRC-32."""


@dataclass(frozen=True)
class Window:
    """A part of a file that is itself an archive, as in a distributed checkpoint."""

    start: int
    size: int


class _Part(io.RawIOBase):
    """A window of an open file, for zipfile."""

    def __init__(self, file: IO[bytes], window: Window) -> None:
        self._file, self._window, self._position = file, window, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._window.size}[whence]
        if start + offset < 0:
            raise OSError("before the start of the archive")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        left = max(self._window.size - self._position, 0)
        self._file.seek(self._window.start + self._position)
        found = self._file.read(left if count is None or count < 0 else min(count, left))
        self._position += len(found)
        return found


def is_archive(path: Path) -> bool:
    """Whether a `.pt` file is an archive, whole or damaged; those of before torch 1.6 are none."""
    with open(path, "rb") as file:
        if file.read(4) == _RECORD_HEADER:  # one that is cut short has no directory at its end
            return True
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def read_archive(path: Path, window: Window | None = None) -> dict[str, Record]:
    """The records of a `.pt` file, or of a `window` of one, by name without the archive's own: `data.pkl`, `data/0`.

    Every record is stored, not compressed, and no two share bytes, so that reading all of them reads no more than the
    file has. Raises DamagedError, or what zipfile raises for a directory that cannot be read.
    """
    with open(path, "rb") as file:
        window = window or Window(0, os.fstat(file.fileno()).st_size)
        part = _Part(file, window)
        with zipfile.ZipFile(part) as archive:  # type: ignore[arg-type]
            infos, end_of_records = archive.infolist(), min(archive.start_dir, window.size)
        records: dict[str, Record] = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise DamagedError(f"its record {info.filename!r} is compressed, which torch never does")
            part.seek(info.header_offset)
            header = part.read(30)
            if len(header) < 30 or header[:4] != _RECORD_HEADER:
                raise DamagedError("it is damaged or cut short")
            start = window.start + info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            name = info.filename.partition("/")[2]
            if name in records:
                raise DamagedError(f"it has two records {name!r}")
            records[name] = Record(info.filename, start, info.file_size, info.CRC)
    begins = [window.start + info.header_offset for info in infos]
    ends = sorted((begin, record.start + record.size) for begin, record in zip(begins, records.values(), strict=True))
    following = [begin for begin, _ in ends[1:]] + [window.start + end_of_records]
    late = bool(ends) and ends[0][0] > window.start
    if late or any(end > begin for (_, end), begin in zip(ends, following, strict=True)):
        raise DamagedError("its records overlap or lie outside of it")
    return records
