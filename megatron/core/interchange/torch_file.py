"""`.pt` files without open pickle: written atomically, read so that nothing in them can run.

torch is imported by the functions that need it: importing it takes longer than most of what is done without it.
"""

import contextlib
import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ
from mmap import mmap as memory_map
from pathlib import Path
from typing import Any

from megatron.core.atomic_files import atomic_writer
from megatron.core.interchange.pickle_machine import EndsEarlyError
from megatron.core.interchange.torch_archive import DamagedError, Record, Window, is_archive, read_archive
from megatron.core.interchange.torch_pickle import INERT_NAMES, INERT_PREFIXES, Inert, check_old_pickles, read_pickle


def save_torch(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` (tensors, plain values, argparse.Namespace) to `path`, which appears only when it is complete.

    Raises OSError naming the file if the disk is full or cannot be written.
    """
    import torch

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
        raise DamagedError(f"the checksum of {damaged} does not match")


def load_torch(path: Path, *, mmap: bool = False, verify: bool = True) -> dict[str, Any]:
    """The dictionary in a `.pt` file, on the CPU, read with `weights_only=True`.

    With `mmap` tensors are read from disk when they are used; with `verify` the file's checksums are compared first
    (one pass over it). Raises FileNotFoundError, or ValueError naming the file if it is damaged, cut short or holds
    anything that would run code.
    """
    import torch

    with readable(Path(path)):
        zipped = is_archive(path)
        _check(Path(path), zipped)
        if zipped and verify:
            _check_sums(path)
        with torch.serialization.safe_globals([Namespace, *_inert_globals(path, zipped)]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
        return _dictionary(content)


def index_torch(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """The same without the tensors' bytes and without torch: tensors are `TensorEntry`.

    A file of before torch 1.6, which is no archive, is read whole. With `foreign`, objects of unknown classes stand for
    nothing; otherwise they are refused.
    """
    if path.is_file() and not is_archive(path):
        return load_torch(path)
    with readable(path):
        return _dictionary(_index(path, foreign=foreign))


def index_value(path: Path, window: Window, *, foreign: bool = False) -> Any:
    """The same of whatever `torch.save` wrote into a `window` of a file: a tensor, or plain values."""
    with readable(path):
        return _index(path, window, foreign)


def archive_records(path: Path, window: Window | None = None) -> dict[str, Record]:
    """The records of a `.pt` file, or of a `window` of one, by name.

    Raises ValueError naming the file if they are not what torch writes.
    """
    with readable(path):
        return read_archive(path, window)


def _check(path: Path, zipped: bool) -> None:
    """Raises what `readable` knows if torch would allocate or read what is not there."""
    if zipped:
        _index(path)
        return
    with open(path, "rb") as file, memory_map(file.fileno(), 0, access=ACCESS_READ) as data:
        check_old_pickles(data)


def _index(path: Path, window: Window | None = None, foreign: bool = False) -> Any:
    records = read_archive(path, window)
    with open(path, "rb") as file:

        def content(record: Record) -> bytes:
            file.seek(record.start)
            return file.read(record.size)

        if "byteorder" in records and content(records["byteorder"]) != b"little":
            raise DamagedError("its numbers are big-endian, which is not supported")
        described = content(records["data.pkl"])
    return read_pickle(described, {name: record.size for name, record in records.items()}, foreign)


def _dictionary(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DamagedError(f"it holds a {type(content).__name__}, not a checkpoint")
    return content


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns whatever torch, pickle or zip make of a damaged file into one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, DamagedError) else "it is damaged or cut short"
        if isinstance(error, pickle.UnpicklingError) and not isinstance(error, EndsEarlyError):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = found.group(1) if found else "something other than tensors and plain values"
            reason = f"it is damaged, or made to do harm: it holds {what}, which is never run"
        raise ValueError(f"cannot read {path}: {reason}; restore the file from its source") from error


def _inert_globals(path: Path, zipped: bool) -> list[tuple[type, str]]:
    """Placeholders for the names of NVIDIA's classes that the file mentions."""
    import torch

    if not zipped:
        return []
    names: list[str] = []
    with contextlib.suppress(ValueError):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [
        (type(name.rpartition(".")[2], (Inert,), {}), name)
        for name in names
        if name.startswith(INERT_PREFIXES) or name in INERT_NAMES
    ]
