"""The archive that a `.pt` file is: its directory, checked before anything in it is read."""

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path


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


def is_archive(path: Path) -> bool:
    """Whether a `.pt` file is an archive, whole or damaged; those of before torch 1.6 are none."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def read_archive(path: Path) -> dict[str, Record]:
    """The records of a `.pt` file by name without the archive's own: `data.pkl`, `data/0`.

    Every record is stored, not compressed, and no two share bytes, so that reading all of them reads no more than the
    file has. Raises DamagedError, or what zipfile raises for a directory that cannot be read.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos, size = archive.infolist(), os.fstat(file.fileno()).st_size
        records: dict[str, Record] = {}
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise DamagedError(f"its record {info.filename!r} is compressed, which torch never does")
            file.seek(info.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise DamagedError("it is damaged or cut short")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            name = info.filename.partition("/")[2]
            if name in records:
                raise DamagedError(f"it has two records {name!r}")
            records[name] = Record(info.filename, start, info.file_size, info.CRC)
        ends = sorted((info.header_offset, record.start + record.size) for info, record in zip(infos, records.values()))
        begins = [begin for begin, _ in ends[1:]] + [min(archive.start_dir, size)]
        if any(end > following for (_, end), following in zip(ends, begins, strict=True)) or (ends and ends[0][0] != 0):
            raise DamagedError("its records overlap or lie outside of it")
        return records
