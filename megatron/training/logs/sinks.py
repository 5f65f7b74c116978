"""Where records are written to. What cannot be written, on a disk that is full for example, stops no training."""

import contextlib
import errno
import itertools
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.core.atomic_files import atomic_writer


class Sink:
    """Drops and counts what cannot be written."""

    target: str
    """What it is called in messages, the flag that names it for example."""
    failures: tuple[type[Exception], ...] = (OSError,)
    """What may go wrong while it writes."""
    dropped = 0
    """Records that were dropped since the last one that was written."""

    def attempt(self, write: Callable[[], object]) -> None:
        """Writes the record, or drops it; reports when that begins and when it ends."""
        try:
            write()
        except self.failures as error:
            if not self.dropped:
                _warn(f"WARNING: records for {self.target} are dropped while they cannot be written: {error}")
            self.dropped += 1
        else:
            if count := self.dropped:
                self.dropped = 0
                _warn(f"{self.target} can be written again; {count} record(s) were dropped")


class Console(Sink):
    """Standard output."""

    target = "standard output"

    def write(self, line: str) -> None:
        """Prints a line."""
        self.attempt(lambda: print(line, flush=True))


class JsonLines(Sink):
    """One JSON object a line."""

    target = "--metrics-path"

    def __init__(self, path: Path, resumed_at: int | None) -> None:
        """`resumed_at`: see `_open_json_lines`."""
        self.file = _open_json_lines(path, resumed_at)

    def write(self, values: Mapping[str, Any]) -> None:
        """Appends a line."""
        line = json.dumps(values) + "\n"
        self.attempt(lambda: _append(self.file, line.encode()))

    def close(self) -> None:
        """Closes the file."""
        self.attempt(self.file.close)


class ScalarSink(Sink, ABC):
    """Takes scalars by their names, as TensorBoard and all loggers do."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        self.attempt(lambda: self._write(iteration, scalars))

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.attempt(self._close)

    @abstractmethod
    def _write(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...


class TensorBoard(ScalarSink):
    """Scalars in TensorBoard's event files, without those of steps after `resumed_at`, which will be taken again.

    Raises ValueError if the package is not installed.
    """

    target = "--tensorboard-dir"

    def __init__(self, folder: str, resumed_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard-dir needs the package tensorboard: pip install tensorboard") from error
        purged = None if resumed_at is None else resumed_at + 1
        self.writer: Any = SummaryWriter(folder, purge_step=purged)  # type: ignore[no-untyped-call]

    def _write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, iteration)

    def _close(self) -> None:
        self.writer.close()


def _warn(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _append(file: Any, line: bytes) -> None:
    """Appends a whole line or nothing to an unbuffered file."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def _open_json_lines(path: Path, resumed_at: int | None) -> Any:
    """Opens for appending, without the lines of steps after `resumed_at`, which will be taken again.

    A new run keeps what another one wrote there under a numbered name. With None all lines stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resumed_at == 0 and path.exists() and path.stat().st_size:  # another run's numbers
        aside = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
    elif resumed_at is not None and path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["iteration"] <= resumed_at else []
            except (ValueError, KeyError, TypeError):  # cut off when the job was killed
                continue
        with atomic_writer(path) as file:
            file.write("".join(line + os.linesep for line in kept).encode())
    return open(path, "ab", buffering=0)
