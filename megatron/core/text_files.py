"""Text and JSON that others wrote: read with one sentence for what is wrong, printed without its control characters."""

import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

# Line breaks and tabs only lay text out; every other control character, and those that turn the direction of text,
# can make a terminal do or show something else.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` as it may go to a terminal: control characters are written as `\\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def shortened(text: str) -> str:
    """`text` as far as it fits into a sentence."""
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


STREAM_NAMES = ("standard output", "standard error")
"""What an OSError names that comes from one of these."""


class _Terminal:
    """A standard stream whose text is printable, and whose reader may leave: then the process ends without a word."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        # a line that shows progress begins with a return to its start, and may erase what was there
        parts = _LIVE.split(text) if self._stream.isatty() else [text]
        with _reader_may_leave(self._stream, self._name):
            self._stream.write("".join(part if _LIVE.fullmatch(part) else printable(part) for part in parts))
        return len(text)

    def flush(self) -> None:
        with _reader_may_leave(self._stream, self._name):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_LIVE = re.compile("(\r(?:\x1b\\[K)?)")


def _discard(stream: TextIO) -> None:
    """Sends what is left to nowhere: Python flushes it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextmanager
def _reader_may_leave(stream: TextIO, name: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _discard(stream)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        if error.filename is None:
            error.filename = name
        raise


def open_standard_streams() -> None:
    """Sends those of standard input, output and error that the caller has closed to nowhere.

    Otherwise the next file that is opened would get the number of one, and what a library prints would get into it.
    """
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    if not closed:
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # it is the lowest that is free
        os.set_inheritable(number, True)
    os.close(number)
    for name in closed:
        stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115 - open to the end
        setattr(sys, name, stream)


@contextmanager
def terminal_output(keep: bool = True) -> Iterator[None]:
    """What is printed within is printable; if the reader has gone (`| head`), SystemExit(141) is raised.

    Raises OSError at the end if the last of it cannot be written, or drops that unless it is to be `keep`t.
    """
    open_standard_streams()
    with ExitStack() as streams:
        streams.enter_context(redirect_stdout(_Terminal(sys.stdout, STREAM_NAMES[0])))  # type: ignore[type-var]
        streams.enter_context(redirect_stderr(_Terminal(sys.stderr, STREAM_NAMES[1])))  # type: ignore[type-var]
        try:
            yield
        finally:  # also where --help ends the program
            try:
                sys.stdout.flush()
            except OSError:
                if keep:
                    raise
                _discard(sys.stdout)


LARGEST_LIST = 4 << 20
"""Bytes of a list or settings that people write: JSON of that size takes up to 100 MB of memory."""


def read_text(path: str | os.PathLike[str], largest: int | None = None) -> str:
    """The text of a UTF-8 file, without the mark that Windows editors put in front.

    Raises ValueError naming it, also if it has more than `largest` bytes.
    """
    if largest is not None and (size := os.path.getsize(path)) > largest:
        raise ValueError(f"{os.fspath(path)} has {size} bytes, more than the {largest} of the largest of its kind")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from None


class DuplicateNameError(Exception):
    """A name that a JSON object has twice; its text may be printed."""


def without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` of json.loads. Raises DuplicateNameError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DuplicateNameError(ascii(shortened(next(name for name in found if counts[name] > 1))))
    return found


def read_json(path: str | os.PathLike[str], largest: int | None = None) -> Any:
    """What a JSON file of at most `largest` bytes holds. Raises ValueError naming the file."""
    text = read_text(path, largest)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(path)} is not JSON that can be read: values are nested too deeply") from None


def read_object(path: str | os.PathLike[str], largest: int | None = None) -> dict[str, Any]:
    """The object that a JSON file of at most `largest` bytes holds. Raises ValueError naming the file."""
    content = read_json(path, largest)
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(content).__name__}, not an object with names and values")
    return content
