"""`.pt` files without open pickle: written atomically, read so that nothing in them can run."""

import contextlib
import pickle
import re
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.atomic_files import atomic_writer

# NVIDIA's checkpoints keep enumerations of its own in `args`. They are read as inert objects; their modules are never
# imported. Any other foreign name is refused.
_INERT_PREFIXES = ("megatron.", "transformer_engine.")
_INERT_NAMES = ("signal.Signals",)


class _Inert:
    """Stands for an object of a class that is not ours: keeps nothing, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _DamagedError(ValueError):
    """The content of a file is not what was written."""


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` (tensors, plain values, argparse.Namespace) to `path`, which appears only when it is complete.

    Raises OSError naming the file if the disk is full or cannot be written.
    """
    try:
        with atomic_writer(Path(path)) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer reports a failed write this way
        reason = str(error).split("\n")[0]
        raise OSError(f"cannot write {path}: the disk may be full or have failed ({reason})") from error


def _check_sums(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise _DamagedError(f"the checksum of {damaged} does not match")


def load_torch(path: Path, *, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """The dictionary in a `.pt` file, on the CPU, read with `weights_only=True`.

    With `mmap` tensors are read from disk when they are used; with `verify` the file's checksums are compared first
    (one pass over it). Raises FileNotFoundError, or ValueError naming the file if it is damaged, cut short or holds
    anything that would run code.
    """
    return _load(Path(path), "cpu", mmap, verify)


def index_torch(path: Path) -> dict[str, Any]:
    """The same without the tensors' bytes: tensors are on the device "meta".

    Their storages know the offset of their bytes in the file (`_checkpoint_offset`). A file of before torch 1.6 has no
    such offsets and is read whole.
    """
    return _load(Path(path), "meta" if zipfile.is_zipfile(path) else "cpu", False, False)


def _load(path: Path, device: str, mmap: bool, verify: bool) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and verify:
            _check_sums(path)
        with torch.serialization.safe_globals([Namespace, *_inert_globals(path, zipped)]):
            content = torch.load(path, map_location=device, weights_only=True, mmap=mmap and zipped)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever torch, pickle or zip make of a damaged file
        reason = str(error) if isinstance(error, _DamagedError) else "it is damaged or cut short"
        if isinstance(error, pickle.UnpicklingError):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = found.group(1) if found else "something other than tensors and plain values"
            reason = f"it is damaged, or made to do harm: it holds {what}, which is never run"
        raise ValueError(f"cannot read {path}: {reason}; restore the file from its source") from error
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it holds a {type(content).__name__}, not a checkpoint")
    return content


def _inert_globals(path: Path, zipped: bool) -> list[tuple[type, str]]:
    """Placeholders for the names of NVIDIA's classes that the file mentions."""
    if not zipped:
        return []
    names: list[str] = []
    with contextlib.suppress(ValueError):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [
        (type(name.rpartition(".")[2], (_Inert,), {}), name)
        for name in names
        if name.startswith(_INERT_PREFIXES) or name in _INERT_NAMES
    ]
