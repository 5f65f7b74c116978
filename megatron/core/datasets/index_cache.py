"""Arrays that are built once and then memory-mapped from files by every process and every later run."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.core.atomic_files import atomic_writer

logger = logging.getLogger(__name__)


def cached_arrays(
    folder: str | os.PathLike[str] | None,
    description: Mapping[str, Any],
    build: Callable[[], dict[str, NDArray]],
) -> dict[str, NDArray]:
    """The arrays that `build` returns, read from `folder` if a whole copy for this `description` is there.

    `description` (JSON-ready) must hold everything the arrays depend on: its hash is the file name. Any number of
    processes may do this at once: each writes under a name of its own and renames, and all write the same bytes. A
    torn or altered copy is built again. With no folder, or one that cannot be written, the arrays stay in memory.
    """
    if folder is None:
        return build()
    text = json.dumps(description, sort_keys=True)
    stem = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:32]
    arrays = _load(stem, text)
    if arrays is not None:
        return arrays
    arrays = build()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        _save(stem, text, arrays)
    except OSError as error:
        logger.warning("cannot keep data set indices in %s (%s): they stay in memory", folder, error)
        return arrays
    return _load(stem, text) or arrays


def _load(stem: Path, description: str) -> dict[str, NDArray] | None:
    try:
        manifest = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        if manifest["description"] != description:
            return None
        arrays = {}
        for name, checksum in manifest["crc32"].items():
            array = np.load(f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False)
            if zlib.crc32(array.reshape(-1).view(np.uint8).data) != checksum:
                raise ValueError(f"{stem}-{name}.npy does not match its checksum")
            arrays[name] = array.view(np.ndarray)
        return arrays
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        logger.warning("data set indices %s.* are damaged (%s): building them again", stem, error)
        return None


def _save(stem: Path, description: str, arrays: dict[str, NDArray]) -> None:
    checksums = {}
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        checksums[name] = zlib.crc32(array.reshape(-1).view(np.uint8).data)
        with atomic_writer(Path(f"{stem}-{name}.npy")) as file:
            np.save(file, array)
    with atomic_writer(Path(f"{stem}.json")) as file:
        file.write(json.dumps({"description": description, "crc32": checksums}).encode())
