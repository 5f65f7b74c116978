"""A lock on a folder that one job writes to, on any file system, which no dead job holds for long."""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LOCK_FILE = ".save.lock"
_POLL = 0.5


class FolderLock:
    """Keeps other jobs from saving to `folder` until `release`, or the end of this process.

    The lock is a file, whose owner holds a POSIX lock on it and renews its time every `interval` seconds. A POSIX lock
    is gone with its process, but another machine may not see it (NFS without locks) or may see it for ever (NFS after
    a crash of the owner's machine); the file's time, compared only with itself, tells there who is alive.
    """

    def __init__(self, folder: Path, *, interval: float = 5.0, patience: float = 30.0) -> None:
        self._folder, self._path = folder, folder / LOCK_FILE
        self._interval, self._patience = interval, patience
        self._descriptor: int | None = None
        self._released = threading.Event()

    def acquire(self, say: Callable[[str], None]) -> None:
        """Takes the lock. Raises ValueError if another job is alive and has it.

        An owner that died on this machine is replaced at once. One on another machine must first be silent for the
        whole patience; `say` then gets the reason why this takes a while.
        """
        first: tuple[int, int] | None = None
        started, said = time.monotonic(), False
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            locked = _try_lock(descriptor)
            owner = _read_owner(descriptor)
            if not self._is_mine(descriptor):  # it was removed meanwhile
                os.close(descriptor)
                continue
            if locked and (not owner or owner.get("boot") == _boot()):
                self._own(descriptor)
                return
            if locked is None and not owner:
                os.close(descriptor)
                self._replace()
                return
            status = os.fstat(descriptor)
            os.close(descriptor)
            beat = status.st_ino, status.st_mtime_ns
            first = first or beat
            if beat != first:
                raise ValueError(self._refusal(owner))
            if time.monotonic() - started > self._patience:
                if locked is False and owner.get("boot") == _boot():  # it is there, but stopped
                    raise ValueError(self._refusal(owner))
                self._replace()
                return
            if not said and time.monotonic() - started > 2 * _POLL:
                said = True
                say(
                    f"{self._folder} was locked by {_name(owner)}: waiting up to {self._patience:.0f} s for a sign of "
                    "its life"
                )
            time.sleep(_POLL)

    def check(self) -> None:
        """Raises ValueError if another job has taken the lock over, which takes a long silence of this one."""
        if self._descriptor is None or self._is_mine(self._descriptor):
            return
        if not self._path.exists():  # someone has removed it
            os.close(self._descriptor)
            self._replace()
            return
        raise ValueError(
            f"another job took over {self._folder} while this one was not running for more than {self._patience:.0f} "
            "s: nothing more is saved here"
        )

    def release(self) -> None:
        """Gives the lock up and removes its file."""
        self._released.set()
        if self._descriptor is not None:
            with suppress(OSError):
                if self._is_mine(self._descriptor):
                    self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _is_mine(self, descriptor: int) -> bool:
        """Whether the path still is the opened file; opening it again would give up the POSIX lock."""
        try:
            found, opened = os.stat(self._path), os.fstat(descriptor)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)

    def _own(self, descriptor: int) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "since": time.strftime("%F %T")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        os.fsync(descriptor)
        first = self._descriptor is None
        self._descriptor = descriptor
        if first:
            threading.Thread(target=self._renew, name="folder lock", daemon=True).start()

    def _replace(self) -> None:
        """Puts a new file in the place of the old one; of several jobs that do so at once the last has the lock."""
        temporary = self._path.with_name(f"{LOCK_FILE}.{socket.gethostname()}.{os.getpid()}.tmp")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        _try_lock(descriptor)
        self._own(descriptor)
        os.replace(temporary, self._path)
        time.sleep(2 * _POLL)
        if not self._is_mine(descriptor):
            raise ValueError(self._refusal({}))

    def _renew(self) -> None:
        while not self._released.wait(self._interval):
            descriptor = self._descriptor
            with suppress(OSError):
                if descriptor is not None:
                    os.utime(descriptor)

    def _refusal(self, owner: dict[str, Any]) -> str:
        since = f" since {owner['since']}" if "since" in owner else ""
        return (
            f"{_name(owner)} is saving to {self._folder}{since}: wait until it has ended, or give this job another "
            "--save folder"
        )


def _name(owner: dict[str, Any]) -> str:
    return f"another job (process {owner['pid']} on {owner['host']})" if "pid" in owner else "another job"


def _try_lock(descriptor: int) -> bool | None:
    """True if the lock is ours, False if another process has it, None where there are no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _read_owner(descriptor: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # empty, or being written
        return {}
    return owner if isinstance(owner, dict) else {}


def _boot() -> str:
    """What is the same for all containers of a running machine, whose processes see each other's locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()
