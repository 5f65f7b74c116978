"""Megatron's indexed data set: `<prefix>.bin` holds tokens back to back, `<prefix>.idx` says where sequences begin.

Little-endian `.idx`: magic, version u64, dtype code u8, sequence count u64, document index count u64, sequence lengths
i32, byte offsets i64, document indices i64 (starting with 0, ending with the sequence count).
"""

import fcntl
import hashlib
import logging
import mmap
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.core.atomic_files import sync_folder
from megatron.core.datasets.description import (
    DatasetDescription,
    Origin,
    description_path,
    file_sha256,
    read_description,
)

logger = logging.getLogger(__name__)

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 20
_FINGERPRINT_PIECES, _FINGERPRINT_BYTES = 128, 1 << 13


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and int32 that NVIDIA's reader expects for a vocabulary of `vocab_size` entries."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def _open_exclusively(path: Path, size: int) -> BinaryIO:
    """Open `path` for appending, cut to `size` bytes. Raises ValueError if it is shorter, or another process's."""
    busy = f"{path}: another process is writing this file; wait for it or choose another output prefix"
    file = open(path, "a+b")  # noqa: SIM115 - the caller keeps it open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(busy) from None
    except OSError:
        logger.warning("%s: this file system has no locks; do not write the same output twice at a time", path)
    # The owner of the lock may have renamed the file between open and flock: then it is no longer ours to empty.
    if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:
        file.close()
        raise ValueError(busy)
    if os.fstat(file.fileno()).st_size < size:
        file.close()
        raise ValueError(f"{path} is shorter than the {size} bytes to continue from: start anew")
    file.truncate(size)
    return file


class WriterState(NamedTuple):
    """How much a writer has on disk; a new writer of the same prefix can continue from it."""

    sequences: int = 0
    documents: int = 0
    tokens: int = 0


NOTHING = WriterState()


class IndexedDatasetWriter:
    """Writes a data set to temporary files beside `prefix` and gives them their names only when it is complete.

    Memory does not grow with the data: lengths and document indices are streamed to disk. Leaving the `with` block
    by an exception, or never calling `finalize`, leaves nothing behind unless `suspend` was called; a killed process
    leaves only `*.tmp` files, which the next writer of the same prefix reuses, or continues from a `checkpoint`.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike, start: WriterState = NOTHING) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(f"token type {dtype} is not one of {', '.join(d.name for d in _DTYPES.values())}")
        self.sequence_count, self.document_count, self.token_count = start
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        sizes = {
            "bin": start.tokens * self.dtype.itemsize,
            "idx": _HEADER.size + 4 * start.sequences,
            "doc": 8 * (start.documents + 1),
        }
        fresh = start == NOTHING
        if not fresh and not Path(f"{self.prefix}.idx").exists() and not Path(f"{self.prefix}.bin.tmp").exists():
            # Killed within `finalize`: the tokens have their name, the index has not.
            os.replace(f"{self.prefix}.bin", f"{self.prefix}.bin.tmp")
        self._files: dict[str, BinaryIO] = {}
        try:
            for suffix, size in sizes.items():
                self._files[suffix] = _open_exclusively(Path(f"{self.prefix}.{suffix}.tmp"), 0 if fresh else size)
        except (OSError, ValueError):
            for file in self._files.values():
                if fresh:
                    os.unlink(file.name)
                file.close()
            raise
        self._bin, self._idx, self._documents = self._files.values()
        self._digest = hashlib.sha256()
        if fresh:
            self._idx.write(bytes(_HEADER.size))
            self._documents.write(struct.pack("<q", 0))
        else:
            self._bin.seek(0)
            while block := self._bin.read(8 * _BLOCK):
                self._digest.update(block)
        self._open = True

    def add_document(self, ids: Sequence[int] | NDArray) -> None:
        """Append one document of one sequence. Raises ValueError if an id does not fit the token type."""
        self.add_documents(ids, [len(ids)])

    def add_documents(self, ids: Sequence[int] | NDArray, lengths: Sequence[int]) -> None:
        """Append documents of one sequence each: `ids` back to back, `lengths` tokens apiece."""
        array = np.asarray(ids)
        assert array.ndim == 1 and len(array) == sum(lengths), (array.shape, sum(lengths))
        if array.dtype != self.dtype and len(array):
            if self.dtype.kind in "iu" and array.dtype.kind in "iu":
                limits = np.iinfo(self.dtype)
                if array.min() < limits.min or array.max() > limits.max:
                    raise ValueError(
                        f"token id {array.max() if array.max() > limits.max else array.min()} does not fit "
                        f"{self.dtype.name}: give the tokenizer's true vocabulary size"
                    )
            elif array.dtype.kind != self.dtype.kind:
                raise ValueError(f"cannot store {array.dtype} tokens as {self.dtype.name}")
        self._write_tokens(np.ascontiguousarray(array, self.dtype).data.cast("B"))
        self._idx.write(np.asarray(lengths, dtype="<i4").tobytes())
        ends = np.arange(self.sequence_count + 1, self.sequence_count + len(lengths) + 1, dtype="<i8")
        self._documents.write(ends.tobytes())
        self._count(len(lengths), len(lengths), len(array))

    def add_file(self, prefix: str | os.PathLike[str]) -> None:
        """Append every document of the data set at `prefix`.

        Raises ValueError if its token type differs, or its tokens have not the checksum of its description.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self.dtype:
            raise ValueError(f"{prefix}: its tokens are {other.dtype.name}, the output's are {self.dtype.name}")
        description = read_description(prefix)
        digest = hashlib.sha256()
        with open(f"{other.prefix}.bin", "rb") as source:
            while block := source.read(8 * _BLOCK):
                self._write_tokens(block)
                if description:
                    digest.update(block)
        if description and digest.hexdigest() != description.sha256.get("bin"):
            raise ValueError(
                f"{other.prefix}.bin has changed since it was written (its SHA-256 is not the description's)"
            )
        for part in _blocks(len(other)):
            self._idx.write(other.sequence_lengths[part].astype("<i4").tobytes())
        ends = other.document_indices[1:]
        for part in _blocks(len(ends)):
            self._documents.write((ends[part] + self.sequence_count).astype("<i8").tobytes())
        self._count(len(other), len(ends), other.token_count)

    def _write_tokens(self, content: bytes | memoryview) -> None:
        self._bin.write(content)
        self._digest.update(content)

    def _count(self, sequences: int, documents: int, tokens: int) -> None:
        self.sequence_count += sequences
        self.document_count += documents
        self.token_count += tokens

    def checkpoint(self) -> WriterState:
        """Bring everything to disk; returns the state from which another writer can continue after a kill."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return WriterState(self.sequence_count, self.document_count, self.token_count)

    def finalize(self, origin: Origin | None = None) -> None:
        """Complete both files, flush them to disk and give them their names, `.bin` first and `.idx` last.

        An older `.idx` of that name is removed before, so that at no moment an index meets another run's tokens. With
        an `origin` a description is written beside them; without one, an older description is removed.
        """
        assert self._open, "the writer is already closed"
        self._write_offsets()
        self._documents.seek(0)
        shutil.copyfileobj(self._documents, self._idx, 8 * _BLOCK)
        self._idx.flush()
        header = _HEADER.pack(MAGIC, VERSION, _CODES[self.dtype], self.sequence_count, self.document_count + 1)
        os.pwrite(self._header_descriptor(), header, 0)
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
        checksums = {"bin": self._digest.hexdigest(), "idx": file_sha256(self._idx.name)}
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        description_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._bin.name, f"{self.prefix}.bin")
        if origin:
            DatasetDescription(
                **origin._asdict(),
                documents=self.document_count,
                tokens=self.token_count,
                dtype=self.dtype.name,
                sha256=checksums,
            ).write(self.prefix)
        os.replace(self._idx.name, f"{self.prefix}.idx")
        os.unlink(self._documents.name)
        sync_folder(Path(self.prefix).parent)
        self._close()

    def _header_descriptor(self) -> int:
        # The index is opened for appending (see _open_exclusively), where Linux would send any write to the end.
        flags = fcntl.fcntl(self._idx.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(self._idx.fileno(), fcntl.F_SETFL, flags & ~os.O_APPEND)
        return self._idx.fileno()

    def _write_offsets(self) -> None:
        self._idx.flush()
        position = 0
        for block in _blocks(self.sequence_count):
            count = block.stop - block.start
            raw = os.pread(self._idx.fileno(), 4 * count, _HEADER.size + 4 * block.start)
            ends = np.cumsum(np.frombuffer(raw, "<i4"), dtype=np.int64) * self.dtype.itemsize + position
            offsets = np.empty(count, "<i8")
            offsets[0], offsets[1:] = position, ends[:-1]
            self._idx.write(offsets.tobytes())
            position = int(ends[-1])

    def abort(self) -> None:
        """Remove the temporary files; does nothing after `finalize` or `suspend`."""
        if self._open:
            for file in self._files.values():
                Path(file.name).unlink(missing_ok=True)
            self._close()

    def suspend(self) -> None:
        """Close the temporary files and leave them, for a writer that continues; does nothing after `finalize`."""
        if self._open:
            self._close()

    def _close(self) -> None:
        self._open = False
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


class IndexedDataset:
    """Read-only, memory-mapped view of `<prefix>.bin` and `<prefix>.idx`; indexing gives one sequence.

    With `random_access` the operating system is told not to read ahead in `.bin`, where that would be read in vain.
    Raises FileNotFoundError if a file is missing and ValueError, naming the file, if the two are not whole and
    consistent.
    """

    def __init__(self, prefix: str | os.PathLike[str], random_access: bool = False) -> None:
        self.prefix, self._random_access = os.fspath(prefix), random_access
        self._idx_path, self._bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (self._idx_path, self._bin_path):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path} does not exist{self._suggestion()}")
        self._index = np.asarray(self._map(self._idx_path))
        self.dtype, sequences = self._read_header()
        lengths_end = _HEADER.size + 4 * sequences
        offsets_end = lengths_end + 8 * sequences
        self.sequence_lengths: NDArray[np.int32] = self._index[_HEADER.size : lengths_end].view("<i4")
        self._offsets: NDArray[np.int64] = self._index[lengths_end:offsets_end].view("<i8")
        self.document_indices: NDArray[np.int64] = self._index[offsets_end:].view("<i8")
        self.token_count = self._check_index(sequences)
        self._tokens = np.asarray(self._map(self._bin_path, random_access)).view(self.dtype)

    @staticmethod
    def _map(path: str, random_access: bool = False) -> NDArray[np.uint8]:
        if not os.path.getsize(path):
            return np.empty(0, np.uint8)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if random_access:
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, np.uint8)

    def _suggestion(self) -> str:
        matches = sorted(Path(self.prefix).parent.glob(f"{Path(self.prefix).name}*_document.idx"))
        if matches:
            return f"; did you mean {str(matches[0]).removesuffix('.idx')}?"
        return "; give the path of a data set without .bin or .idx, as tools/preprocess_data.py wrote it"

    def _read_header(self) -> tuple[np.dtype, int]:
        size = len(self._index)
        if size < _HEADER.size:
            raise ValueError(f"{self._idx_path} is {size} bytes long, too short for an index: write the data set again")
        magic, version, code, sequences, documents = _HEADER.unpack(self._index[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(f"{self._idx_path} is not an index of Megatron's mmap format (magic {magic!r})")
        if version != VERSION:
            raise ValueError(f"{self._idx_path} has version {version}; only version {VERSION} can be read")
        if code not in _DTYPES:
            raise ValueError(f"{self._idx_path} has an unknown token type code {code}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size != expected or documents < 1:
            raise ValueError(
                f"{self._idx_path} is {size} bytes long, but {sequences} sequences and {documents} document indices "
                f"take {expected}: write the data set again"
            )
        return _DTYPES[code], sequences

    def _check_index(self, sequences: int) -> int:
        """Check that lengths, offsets, document indices and the size of `.bin` agree; returns the token count."""
        position = 0
        for block in _blocks(sequences):
            lengths = self.sequence_lengths[block]
            ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize + position
            starts = self._offsets[block]
            if lengths.min() < 0 or starts[0] != position or not np.array_equal(starts[1:], ends[:-1]):
                raise ValueError(f"{self._idx_path} has sequence lengths and offsets that disagree")
            position = int(ends[-1])
        documents = self.document_indices
        if (
            documents[0] != 0
            or documents[-1] != sequences
            or any(np.any(np.diff(documents[block.start : block.stop + 1]) < 0) for block in _blocks(len(documents)))
        ):
            raise ValueError(f"{self._idx_path} has document indices that do not rise from 0 to {sequences}")
        size = os.path.getsize(self._bin_path)
        if size != position:
            raise ValueError(f"{self._bin_path} is {size} bytes long, but its .idx describes {position}")
        return position // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> NDArray:
        return self.get(index)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str, bool]]:
        return IndexedDataset, (self.prefix, self._random_access)

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray:
        """Tokens `[offset, offset + length)` of a sequence (to its end if no length), as a view of type `dtype`."""
        size = int(self.sequence_lengths[index])
        return self._slice(int(self._offsets[index]), size, offset, length)

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> NDArray:
        """The same for a document, whose sequences follow each other."""
        start, end = (self._byte_offset(int(self.document_indices[document + i])) for i in (0, 1))
        return self._slice(start, (end - start) // self.dtype.itemsize, offset, length)

    def count_tokens(self, start: int, stop: int) -> int:
        """Tokens in the documents `[start, stop)`."""
        first, end = (self._byte_offset(int(self.document_indices[document])) for document in (start, stop))
        return (end - first) // self.dtype.itemsize

    def document_lengths(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens of each of the documents `[start, stop)`. Raises ValueError if one has 2^31 or more."""
        result = np.empty(stop - start, np.int32)
        for block in _blocks(stop - start):
            sequences = self.document_indices[start + block.start : start + block.stop + 1]
            bounds = np.full(len(sequences), self.token_count, np.int64)
            inside = sequences < len(self)
            bounds[inside] = self._offsets[sequences[inside]] // self.dtype.itemsize
            lengths = np.diff(bounds)
            if lengths.max() > np.iinfo(np.int32).max:
                raise ValueError(f"{self.prefix}: a document of {lengths.max()} tokens is too long (2^31 - 1 at most)")
            result[block] = lengths
        return result

    def _byte_offset(self, sequence: int) -> int:
        return int(self._offsets[sequence]) if sequence < len(self) else self.token_count * self.dtype.itemsize

    def _slice(self, byte_offset: int, size: int, offset: int, length: int | None) -> NDArray:
        length = size - offset if length is None else length
        assert offset >= 0 and length >= 0 and offset + length <= size, (offset, length, size)
        start = byte_offset // self.dtype.itemsize + offset
        return self._tokens[start : start + length]

    def tokens(self, start: int, stop: int) -> NDArray:
        """The tokens `[start, stop)` of all sequences laid end to end."""
        return self._tokens[start:stop]

    def token_blocks(self, size: int) -> Iterator[NDArray]:
        """Up to `size` tokens each from the beginning, the middle and the end, for a quick look at the contents."""
        last = max(self.token_count - size, 0)
        for start in (0, last // 2, last):
            yield self._tokens[start : start + size]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the whole `.idx`, and of the `.bin` or, if it is large, of pieces all over it.

        It changes with the number, lengths and type of the sequences, and if other text takes the place of theirs.
        """
        digest = hashlib.sha256(self._index.data)
        content = self._tokens.view(np.uint8)
        if len(content) <= _FINGERPRINT_PIECES * _FINGERPRINT_BYTES:
            digest.update(content.data)
        else:
            for start in np.linspace(0, len(content) - _FINGERPRINT_BYTES, _FINGERPRINT_PIECES).astype(np.int64):
                digest.update(content[start : start + _FINGERPRINT_BYTES].data)
        return digest.hexdigest()
