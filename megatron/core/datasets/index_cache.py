"""Arrays that are built once and then memory-mapped from one file by every process and every later run."""

import hashlib
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.atomic_files import atomic_writer, error_sentence, remove_unfinished
from megatron.core.datasets.mapped_file import map_file

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_COPIES = 8


class ArrayType(NamedTuple):
    """Shape and type of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


# Takes an array's name and its next rows.
Put = Callable[[str, NDArray], None]


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what processes that were killed have left in `folder`; what others are building there is left alone."""
    remove_unfinished(Path(folder), "*.index")


def cached_arrays(
    folder: str | os.PathLike[str] | None,
    description: Mapping[str, Any],
    types: Mapping[str, ArrayType],
    build: Callable[[Put], None],
) -> dict[str, NDArray]:
    """The arrays that `build` puts, row after row, read from `folder` if a whole copy for this `description` is there.

    `description` (JSON-ready) must hold everything the arrays depend on: its hash is the file's name. A file is never
    replaced, since other processes may have it mapped: any number of them may build at once, the first to finish leaves
    its file to all, and a damaged file is passed over for a new one with another name. With no folder, or one that
    cannot be written, the arrays stay in memory.
    """
    if folder is None:
        return _in_memory(types, build)
    layout = _Layout(description, types)
    name = hashlib.sha256(layout.header).hexdigest()[:32]
    for copy in range(_COPIES):
        path = Path(folder) / (f"{name}.index" if copy == 0 else f"{name}-{copy}.index")
        try:
            if not path.exists():
                Path(folder).mkdir(parents=True, exist_ok=True)
                _write(path, layout, build)
            return layout.read(path)
        except _DamagedError as error:
            logger.warning("data set indices %s are damaged (%s): building them again", path, error)
        except OSError as error:
            logger.warning(
                "cannot keep data set indices in %s (%s): they stay in memory", folder, error_sentence(error)
            )
            break
    return _in_memory(types, build)


def _in_memory(types: Mapping[str, ArrayType], build: Callable[[Put], None]) -> dict[str, NDArray]:
    arrays = {name: np.empty(kind.shape, kind.dtype) for name, kind in types.items()}
    filled = dict.fromkeys(types, 0)

    def put(name: str, rows: NDArray) -> None:
        arrays[name][filled[name] : filled[name] + len(rows)] = rows
        filled[name] += len(rows)

    build(put)
    assert all(filled[name] == len(arrays[name]) for name in arrays), filled
    return arrays


class _DamagedError(Exception):
    """A cache file that cannot be used, and why."""


class _Layout:
    """A file of arrays: a header that says what they are, the arrays, and their CRC-32, each on a 64-byte boundary."""

    def __init__(self, description: Mapping[str, Any], types: Mapping[str, ArrayType]) -> None:
        arrays = {name: [list(kind.shape), kind.dtype.str] for name, kind in types.items()}
        header = json.dumps({"description": description, "arrays": arrays}, sort_keys=True).encode()
        self.header = header.ljust(_aligned(len(header)))
        self.types = types
        self.offsets: dict[str, int] = {}
        end = len(self.header)
        for name, kind in types.items():
            self.offsets[name] = end
            end = _aligned(end + kind.size)
        self.checksums_at = end
        self.size = end + 4 * len(types)

    def read(self, path: Path) -> dict[str, NDArray]:
        """The arrays, memory-mapped. Raises _DamagedError if the file is not whole or is of something else."""
        if path.stat().st_size != self.size:
            raise _DamagedError(f"it has {path.stat().st_size} bytes, not {self.size}")
        content = map_file(path)
        if content[: len(self.header)].tobytes() != self.header:
            raise _DamagedError("its header describes something else")
        checksums = content[self.checksums_at :].view("<u4").tolist()
        arrays = {}
        for (name, kind), checksum in zip(self.types.items(), checksums, strict=True):
            raw = content[self.offsets[name] : self.offsets[name] + kind.size]
            if zlib.crc32(raw.data) != checksum:
                raise _DamagedError(f"its {name} does not match the checksum")
            arrays[name] = raw.view(kind.dtype).reshape(kind.shape)
        return arrays


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _write(path: Path, layout: _Layout, build: Callable[[Put], None]) -> None:
    with atomic_writer(path, keep_first=True) as file:
        filled = dict.fromkeys(layout.types, 0)
        checksums = dict.fromkeys(layout.types, 0)

        def put(name: str, rows: NDArray) -> None:
            raw = np.ascontiguousarray(rows, layout.types[name].dtype).reshape(-1).view(np.uint8).data
            file.seek(layout.offsets[name] + filled[name])
            file.write(raw)
            filled[name] += len(raw)
            checksums[name] = zlib.crc32(raw, checksums[name])

        file.write(layout.header)
        build(put)
        assert all(filled[name] == kind.size for name, kind in layout.types.items()), filled
        file.seek(layout.checksums_at)
        file.write(np.array(list(checksums.values()), "<u4").tobytes())
