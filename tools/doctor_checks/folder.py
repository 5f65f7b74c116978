"""The folder that checkpoints go to: kind of file system, space, speed, and what saving relies on."""

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tools.doctor_checks.finding import Finding, ok, problem, warning

GIB = 2**30
_WRITTEN = 256 << 20
_PIECE = 8 << 20
_SLOW = 100e6
_IN_MEMORY = ("tmpfs", "ramfs")
_MOUNTS = Path("/proc/mounts")


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder is on; empty where the system does not say."""
    try:
        lines = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    real = folder.resolve()
    points = {line[1].replace("\\040", " "): line[2] for line in lines if len(line) > 2}
    holding = [point for point in points if real.is_relative_to(point)]
    return points[max(holding, key=len)] if holding else ""


def check_folder(folder: Path) -> Iterator[Finding]:
    """Writes 256 MiB to a file that it removes."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        yield problem("checkpoints", f"{place} is no folder", "give another one with --folder")
        return
    kind = file_system(place) or "unknown file system"
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    text = f"{folder}: {kind}, {free / GIB:.1f} GiB free"
    try:
        speed, locks = _try(place, min(_WRITTEN, max(free // 4, _PIECE)))
    except OSError as error:
        yield problem(
            "checkpoints", f"{text}; nothing can be saved there ({error.strerror})", "choose another --folder"
        )
        return
    text += f", writes {speed / 1e6:.0f} MB/s with fsync"
    if kind in _IN_MEMORY:
        yield warning("checkpoints", text, "what is saved there is gone when the machine restarts")
    elif speed < _SLOW:
        yield warning(
            "checkpoints", text, "a checkpoint of 8x7B is 650 GB: save to a faster disk, or with --async-save"
        )
    else:
        yield ok("checkpoints", text)
    if not locks:
        yield warning(
            "file locks",
            f"{kind} has none: two runs that save to one folder are not noticed",
            "give each its own --save",
        )


def _try(folder: Path, size: int) -> tuple[float, bool]:
    """Bytes written a second, and whether files can be locked."""
    piece = os.urandom(_PIECE)  # that no file system compresses
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
        start = time.monotonic()
        for _ in range(0, size, _PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        speed = -(-size // _PIECE) * _PIECE / max(time.monotonic() - start, 1e-9)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return speed, False
    return speed, True
