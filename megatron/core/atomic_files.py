"""Files and folders that are either whole or absent after a kill or a power cut."""

import contextlib
import errno
import fcntl
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron.core.text_files import printable

# The process's file mode mask can only be read by setting it.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts `path` into errors of the operating system that name no file, as those of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror:
            error.filename = str(path)
        raise


def sync_file(file: BinaryIO) -> None:
    """Brings what was written to `file` to the disk. Raises OSError naming the file."""
    with naming(Path(file.name)):
        file.flush()
        os.fsync(file.fileno())


def append(file: BinaryIO, content: bytes | memoryview) -> None:
    """Writes to `file`. Raises OSError naming the file."""
    with naming(Path(file.name)):
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Makes renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def atomic_writer(path: Path, keep_first: bool = False) -> Iterator[BinaryIO]:
    """A file to write that appears as `path` only when all of it is on disk; on an error nothing is left.

    Processes that write the same path at once do not disturb each other: the last one to finish wins, or with
    `keep_first` the first, and a file that is there is left alone.
    """
    try:
        file = _locked_temporary(path)
    except OSError as error:
        error.filename = str(path)  # not the temporary name, which no user has seen
        raise
    try:
        with naming(path), file:
            yield file
            file.flush()
            with contextlib.suppress(PermissionError):
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # temporary files are made for their owner alone
            os.fsync(file.fileno())
            # before the lock is given up: without it the file would be taken for a leftover
            if keep_first:
                _rename_if_absent(file.name, path)
            else:
                os.replace(file.name, path)
    except BaseException:
        Path(file.name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _locked_temporary(path: Path) -> BinaryIO:
    """A new file to be renamed to `path`, which says by a lock that its writer lives."""
    while True:
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False)  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # who removes leftovers has it, and was faster
            Path(file.name).unlink(missing_ok=True)
        except OSError:  # a file system without locks
            return file  # type: ignore[return-value]
        if os.path.exists(file.name):
            return file  # type: ignore[return-value]
        file.close()


def remove_unfinished(folder: Path, names: str) -> None:
    """Removes what killed processes have left of writing files in `folder` whose names match the pattern `names`.

    What a living process is writing is left alone, also by other processes that do the same.
    """
    for leftover in folder.glob(f".{names}.*.tmp"):
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds the lock
            leftover.unlink()


def _rename_if_absent(temporary: str, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # file systems without hard links
            raise
        if not path.exists():
            os.replace(temporary, path)
    Path(temporary).unlink(missing_ok=True)


@contextmanager
def exclusive_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` and keeps other processes that ask for it out. Raises ValueError if one is already in it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}: wait until it is done") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def allow_open_files() -> None:
    """Raises the soft limit of open files to the hard one, which is what an administrator allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # where the hard limit is said to be infinite but is not
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


_LONGEST_SENTENCE = 1000


def error_sentence(error: ValueError | OSError) -> str:
    """What a user reads: the message, and of an operating system's error the file and the reason.

    It is printable, and what a file says in it takes no more than a few lines.
    """
    sentence = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        # of a rename the new name, which the user knows
        name = error.filename if error.filename2 is None else error.filename2
        sentence = error.strerror if name is None else f"{os.fsdecode(name)}: {error.strerror}"
    sentence = printable(sentence)
    if len(sentence) > _LONGEST_SENTENCE:  # the remedy stands at the end
        sentence = f"{sentence[: _LONGEST_SENTENCE // 2]} ... {sentence[-_LONGEST_SENTENCE // 2 :]}"
    return sentence
