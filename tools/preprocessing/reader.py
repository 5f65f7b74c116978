"""Blocks of a corpus: pieces of about CHUNK_BYTES that worker processes take, of any kind of file."""

import bz2
import contextlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from tools.preprocessing import inputs
from tools.preprocessing.inputs import Input
from tools.preprocessing.kinds import HEAD_BYTES, PARQUET, UNREADABLE, foreign

# A document beyond this is no document; the bound keeps the memory of a file without line ends bounded.
LONGEST_LINE = 64 << 20
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROWS = 64
_PIECE = 1 << 20
# What a decompressor may need: the window of zstd --long=27, which is zstd's own limit, and of xz -9.
_LARGEST_WINDOW = 128 << 20
_WINDOW_TOO_LARGE = f"it needs a window of more than {_LARGEST_WINDOW >> 20} MiB: compress it again with a smaller one"


class Block(NamedTuple):
    """A piece of a file. Of a plain file only the place, which the worker reads; of others what was read."""

    path: str
    start: int
    end: int
    lines: bytes | None = None
    columns: list[list[Any]] | None = None
    broken: str | None = None
    """Why something was left out: a line that is too long, or the rest of a file that cannot be read."""
    lost: int = 0
    """Bytes on disk that cannot be read."""


def blocks_of(part: Input, keys: list[str], skip: int = 0) -> Iterator[Block]:
    """The blocks of a file in order from block `skip` on; where they are cut depends on the file alone.

    Raises ValueError if a library to read the file is missing or a Parquet file lacks a column.
    """
    if part.is_plain:
        first = part.start + skip * inputs.CHUNK_BYTES
        for start in range(first, part.end, inputs.CHUNK_BYTES):
            yield Block(part.path, start, min(start + inputs.CHUNK_BYTES, part.end))
        return
    if part.kind.reading == UNREADABLE:
        stream: Iterator[Block] = iter(
            [Block(part.path, 0, part.end, b"", None, part.kind.what, max(part.end, part.kind.size))]
        )
    else:
        stream = _parquet_blocks(part, keys) if part.kind.reading == PARQUET else _line_blocks(part)
    for number, block in enumerate(stream):
        if number >= skip:
            yield block


def _line_blocks(part: Input) -> Iterator[Block]:
    """Whole lines of a compressed file. A file that breaks off gives its whole lines, then a block that says so."""
    buffer = bytearray()
    searched = position = good = dropped = 0
    failure = None
    with open(part.path, "rb") as raw:
        pieces = _checked(_decompressed(part, raw))
        while True:
            piece = b""
            try:
                piece, good = next(pieces, (b"", part.end))
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                begun = position or buffer.count(b"\n")
                failure = f"{'the rest of ' if begun else ''}this file cannot be read ({error})"
            buffer += piece
            if piece and len(buffer) < searched + inputs.CHUNK_BYTES:
                continue
            end = buffer.rfind(b"\n", searched) + 1 if piece or failure else len(buffer)
            searched = 0 if end else len(buffer)
            if end or (dropped and not piece):
                start, size = position, dropped + len(buffer)
                first = (buffer.find(b"\n") + 1 or len(buffer)) if dropped else 0
                if dropped:
                    position = start + (good - start) * (dropped + first) // size
                    yield Block(part.path, start, position, b"", None, TOO_LONG, position - start)
                if first < end:
                    # Bytes on disk behind the last line end belong to the next block, or are lost.
                    begin, position = position, start + (good - start) * (dropped + end) // size
                    yield Block(part.path, begin, position, bytes(buffer[first:end]))
                dropped = 0
                del buffer[:end]
            elif dropped or len(buffer) > LONGEST_LINE:
                dropped += len(buffer)
                buffer.clear()
                searched = 0
            if not piece:
                break
        if failure:
            yield Block(part.path, position, part.end, b"", None, failure, max(part.end - position, 1))


def _checked(pieces: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    """The same. Raises OSError if what is compressed is something else than lines."""
    for number, (piece, end) in enumerate(pieces):
        if not number and (what := foreign(piece[:HEAD_BYTES])):
            raise OSError(f"it holds {what}")
        yield piece, end


def _decompressed(part: Input, raw: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """The content in small pieces, each with where it ends on disk. Raises OSError and the like where it breaks off."""
    if part.kind.reading == "gzip":
        return _members(raw, lambda: zlib.decompressobj(31), 1 << 14)
    if part.kind.reading == "bzip2":
        return _members(raw, lambda: _Bounded(bz2.BZ2Decompressor()), 1 << 14)
    if part.kind.reading == "xz":
        return _members(raw, lambda: _Bounded(lzma.LZMADecompressor(memlimit=_LARGEST_WINDOW + (8 << 20))), 1 << 14)
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{part.path}: reading .zst files needs the package zstandard (pip install zstandard)"
        ) from None

    def frames() -> Iterator[tuple[bytes, int]]:
        try:
            decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
            yield from _members(raw, decompressor.decompressobj, 1 << 12)
        except zstandard.ZstdError as error:
            raise OSError(_WINDOW_TOO_LARGE if "too much memory" in str(error) else str(error)) from None

    return frames()


class _Bounded:
    """A decompressor of the standard library that gives pieces of bounded size; `decompress(b"")` gives more."""

    def __init__(self, decompressor: Any) -> None:
        self._decompressor = decompressor

    def decompress(self, data: bytes) -> bytes:
        """The next piece."""
        try:
            return self._decompressor.decompress(data, _PIECE)
        except lzma.LZMAError as error:
            raise OSError(_WINDOW_TOO_LARGE if "limit" in str(error) else str(error)) from None

    @property
    def has_more(self) -> bool:
        """Whether there is more without more data."""
        return not self._decompressor.eof and not self._decompressor.needs_input

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decompressor, name)


def _members(raw: IO[bytes], decompressor: Callable[[], Any], size: int) -> Iterator[tuple[bytes, int]]:
    """Content of gzip members, zstd frames and the like, one after the other, from `size` bytes at a time."""
    current = None
    while data := raw.read(size):
        while data:
            if current is None:
                data = data.lstrip(b"\0")  # padding between or after members
                if not data:
                    break
                current = decompressor()
            piece = current.decompress(data)
            while piece or getattr(current, "has_more", False):
                if piece:
                    yield piece, raw.tell() - len(current.unused_data)
                piece = current.decompress(b"") if getattr(current, "has_more", False) else b""
            if not current.eof:
                break
            data, current = current.unused_data, None
    if current:
        raise EOFError("it ends too early")


def check_columns(parts: list[Input], keys: list[str]) -> None:
    """Raises ValueError if a Parquet file lacks a column, or if there is one and pyarrow is missing."""
    for part in parts:
        if part.kind.reading == PARQUET:
            with contextlib.suppress(OSError):
                _open_parquet(part.path, keys).close()


def _open_parquet(path: str, keys: list[str]) -> Any:
    """A Parquet file that has the columns `keys`. Raises ValueError if not, OSError if it cannot be read."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading .parquet files needs the package pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=inputs.CHUNK_BYTES, pre_buffer=False)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from None
    for key in keys:
        if key not in names:
            raise ValueError(f"{path} has no column {key!r}; its columns are {', '.join(map(repr, names[:20]))}")
    return file


def _values(column: Any) -> list[Any]:
    """The values of a column; of one with bad UTF-8 in it the bytes, which are looked at one by one."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow

        return column.cast(pyarrow.large_binary()).to_pylist()


def _batches(path: str, keys: list[str]) -> Iterator[tuple[Any, int]]:
    """A few rows at a time, and how many rows the file has. Raises OSError where it cannot be read."""
    file = _open_parquet(path, keys)
    import pyarrow

    try:
        for batch in file.iter_batches(_ROWS, columns=keys, use_threads=False):
            yield batch, file.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise OSError(str(error)) from None


def _parquet_blocks(part: Input, keys: list[str]) -> Iterator[Block]:
    done = position = size = 0
    total = 1
    rows: list[list[Any]] = [[] for _ in keys]
    failure = None
    batches = _batches(part.path, keys)
    while True:
        batch = None
        try:
            batch, total = next(batches, (None, total))
        except OSError as error:
            failure = f"{'the rest of ' if done else ''}this file cannot be read ({error})"
        if batch is not None:
            for values, key in zip(rows, keys):
                values += _values(batch.column(key))
            size += batch.nbytes
            done += batch.num_rows
        if rows[0] and (batch is None or size >= inputs.CHUNK_BYTES):
            start, position = position, part.end * done // max(total, done)  # a damaged file may have more rows
            yield Block(part.path, start, position, None, rows)
            rows, size = [[] for _ in keys], 0
        if batch is None:
            break
    if failure:
        yield Block(part.path, position, part.end, b"", None, failure, max(part.end - position, 1))


class Lines(NamedTuple):
    """Lines of a block of text without their ends; a size stands for one that is too long."""

    lines: list[bytes | int]
    ends: bool
    """Whether the last line has a line end."""

    def size(self, start: int, count: int) -> int:
        """Bytes of `count` equal lines from line `start` on, with their ends."""
        line = self.lines[start]
        size = line if isinstance(line, int) else len(line) + 1
        return size * count - (not self.ends and start + count == len(self.lines))


def lines_of(block: Block) -> Lines:
    """Lines that begin in a block of text."""
    last: bytes | int = b""
    ends = True
    if block.lines is not None:
        content = b"\n" + block.lines
        ends = content.endswith(b"\n")
        last = _bounded(content[content.rfind(b"\n") + 1 :])
    else:
        with open(block.path, "rb") as file:
            file.seek(max(block.start - 1, 0))
            content = file.read(block.end - file.tell())
            if not block.start:
                content = b"\n" + content
            elif b"\n" not in content:
                return Lines([], True)
            else:  # a line that began in an earlier block is that block's; one that begins exactly here is this one's
                content = content[content.find(b"\n") :]
            if begun := content[content.rfind(b"\n") + 1 :]:
                last, ends = _complete(begun, file)
    lines: list[bytes | int] = [*content.split(b"\n")[1:-1], *([last] if last else [])]
    if len(content) > LONGEST_LINE:
        lines = [line if isinstance(line, int) else _bounded(line) for line in lines]
    if block.start == 0 and lines and isinstance(first := lines[0], bytes):
        lines[0] = first.removeprefix(_BYTE_ORDER_MARK)
    return Lines(lines, ends)


def _complete(begun: bytes, file: IO[bytes]) -> tuple[bytes | int, bool]:
    """The whole of a line that has begun, without its end, or its size if it is too long; and whether it has an end."""
    pieces, size, ends = [begun], len(begun), False
    while not ends and (piece := file.readline(inputs.CHUNK_BYTES)):
        ends = piece.endswith(b"\n")
        size += len(piece)
        if size - ends <= LONGEST_LINE:
            pieces.append(piece)
    return (size + (not ends) if size - ends > LONGEST_LINE else b"".join(pieces).removesuffix(b"\n")), ends


def _bounded(line: bytes) -> bytes | int:
    return line if len(line) <= LONGEST_LINE else len(line) + 1
