"""Blocks of a corpus: pieces of about CHUNK_BYTES that worker processes take, of any kind of file."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from tools.preprocessing import inputs
from tools.preprocessing.inputs import Input

# A document beyond this is no document; the bound keeps the memory of a file without line ends bounded.
LONGEST_LINE = 64 << 20
TOO_LONG = f"longer than {LONGEST_LINE >> 20} MiB"
_ROWS = 64


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
    stream = _parquet_blocks(part, keys) if part.path.endswith(".parquet") else _line_blocks(part)
    for number, block in enumerate(stream):
        if number >= skip:
            yield block


def _line_blocks(part: Input) -> Iterator[Block]:
    """Whole lines of a compressed file. A file that breaks off gives its whole lines, then a block that says so."""
    buffer = bytearray()
    searched = position = 0
    too_long = False
    failure = None
    with open(part.path, "rb") as raw:
        pieces = _decompressed(part.path, raw)
        while True:
            try:
                piece = next(pieces, b"")
            except (OSError, EOFError, zlib.error) as error:
                failure, piece = f"the rest of this file cannot be read ({error})", b""
            buffer += piece
            if piece and len(buffer) < searched + inputs.CHUNK_BYTES:
                continue
            end = buffer.rfind(b"\n", searched) + 1 if piece or failure else len(buffer)
            searched = 0 if end else len(buffer)
            if end or (too_long and not piece):
                start, position = position, raw.tell()
                first = buffer.find(b"\n") + 1 if too_long else 0
                if too_long:
                    yield Block(part.path, start, start, b"", None, TOO_LONG)
                    too_long = False
                if first < end:
                    yield Block(part.path, start, position, bytes(buffer[first:end]))
                del buffer[:end]
            elif too_long or len(buffer) > LONGEST_LINE:
                too_long = True
                buffer.clear()
                searched = 0
            if not piece:
                break
        if failure:
            yield Block(part.path, position, part.end, b"", None, failure, max(part.end - raw.tell(), 1))


def _decompressed(path: str, raw: IO[bytes]) -> Iterator[bytes]:
    """The content in small pieces. Raises OSError, EOFError or zlib.error where it cannot be read."""
    if path.endswith(".gz"):
        return _members(raw, lambda: zlib.decompressobj(31), 1 << 14)
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{path}: reading .zst files needs the package zstandard (pip install zstandard)") from None

    def frames() -> Iterator[bytes]:
        try:
            yield from _members(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, 1 << 12)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None

    return frames()


def _members(raw: IO[bytes], decompressor: Callable[[], Any], size: int) -> Iterator[bytes]:
    """Content of gzip members or zstd frames, one after the other, from `size` bytes at a time."""
    current = None
    while data := raw.read(size):
        while data:
            current = current or decompressor()
            if piece := current.decompress(data):
                yield piece
            if not current.eof:
                break
            data, current = current.unused_data, None
            data = data if data.strip(b"\0") else b""  # padding after the last member
    if current:
        raise EOFError("it ends too early")


def check_columns(parts: list[Input], keys: list[str]) -> None:
    """Raises ValueError if a Parquet file lacks a column, or if there is one and pyarrow is missing."""
    for part in parts:
        if part.path.endswith(".parquet"):
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
    except pyarrow.ArrowInvalid as error:
        raise OSError(str(error)) from None
    names = file.schema_arrow.names
    for key in keys:
        if key not in names:
            raise ValueError(f"{path} has no column {key!r}; its columns are {', '.join(map(repr, names[:20]))}")
    return file


def _parquet_blocks(part: Input, keys: list[str]) -> Iterator[Block]:
    done = position = size = 0
    total = 1
    rows: list[list[Any]] = [[] for _ in keys]
    failure = None
    file, batches = None, iter(())
    while True:
        try:
            if file is None:
                file = _open_parquet(part.path, keys)
                total = max(file.metadata.num_rows, 1)
                batches = file.iter_batches(_ROWS, columns=keys, use_threads=False)
            batch = next(batches, None)
        except OSError as error:
            failure, batch = f"the rest of this file cannot be read ({error})", None
        if batch is not None:
            for values, key in zip(rows, keys):
                values += batch.column(key).to_pylist()
            size += batch.nbytes
            done += batch.num_rows
        if rows[0] and (batch is None or size >= inputs.CHUNK_BYTES):
            start, position = position, part.end * done // total
            yield Block(part.path, start, position, None, rows)
            rows, size = [[] for _ in keys], 0
        if batch is None:
            break
    if failure:
        yield Block(part.path, position, part.end, b"", None, failure, max(part.end - position, 1))


def lines_of(block: Block) -> tuple[list[bytes | None], int]:
    """Lines of a block of text, line ends included or not, and how many; None stands for one that is too long."""
    if block.lines is not None:
        lines: list[bytes | None] = [_bounded(line) for line in block.lines.split(b"\n")]
        if lines and not lines[-1]:
            lines.pop()
        return lines, len(lines)
    with open(block.path, "rb") as file:
        file.seek(max(block.start - 1, 0))
        lines = list(file.read(block.end - max(block.start - 1, 0)).split(b"\n"))
        if block.start:
            # The line that began in an earlier block is that block's; one that begins exactly here is this one's.
            del lines[0]
        if lines:
            last = lines.pop()
            if last:
                lines.append(_complete(last, file))
    return lines, len(lines)


def _complete(begun: bytes, file: IO[bytes]) -> bytes | None:
    """The whole of a line of which the file's position is inside, or None if it is too long."""
    pieces, size = [begun], len(begun)
    while piece := file.readline(inputs.CHUNK_BYTES):
        pieces.append(piece)
        size += len(piece)
        if size > LONGEST_LINE or piece.endswith(b"\n"):
            break
    return _bounded(b"".join(pieces))


def _bounded(line: bytes) -> bytes | None:
    return line if len(line) <= LONGEST_LINE else None
