"""Megatron's indexed data set: `<prefix>.bin` holds tokens back to back, `<prefix>.idx` says where sequences begin.

Little-endian `.idx`: magic, version u64, dtype code u8, sequence count u64, document index count u64, sequence lengths
i32, byte offsets i64, document indices i64 (starting with 0, ending with the sequence count).
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron.core.datasets.mapped_file import map_file

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 20
_FINGERPRINT_PIECES, _FINGERPRINT_BYTES = 128, 1 << 13


def optimal_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and int32 that NVIDIA's reader expects for a vocabulary of `vocab_size` entries."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def data_set_prefix(path: str) -> str:
    """The prefix of the data set that `path` names, itself or by one of its files."""
    return path.removesuffix(".bin").removesuffix(".idx").removesuffix(".json")


def blocks(count: int) -> Iterator[slice]:
    """Cuts `count` elements into slices of at most `BLOCK`."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


class IndexedDataset:
    """Read-only, memory-mapped view of `<prefix>.bin` and `<prefix>.idx`; indexing gives one sequence.

    With `random_access` the operating system is asked not to read ahead in `.bin`, where read-ahead is wasted.
    Raises FileNotFoundError if a file is missing and ValueError, naming the file, if the two are not whole and
    consistent.
    """

    def __init__(self, prefix: str | os.PathLike[str], random_access: bool = False) -> None:
        self.prefix, self._random_access = os.fspath(prefix), random_access
        self._idx_path, self._bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        for path in (self._idx_path, self._bin_path):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path} does not exist{self._suggestion()}")
        self._index = map_file(self._idx_path)
        self.dtype, sequences = self._read_header()
        lengths_end = HEADER.size + 4 * sequences
        offsets_end = lengths_end + 8 * sequences
        self.sequence_lengths: NDArray[np.int32] = self._index[HEADER.size : lengths_end].view("<i4")
        self._offsets: NDArray[np.int64] = self._index[lengths_end:offsets_end].view("<i8")
        self.document_indices: NDArray[np.int64] = self._index[offsets_end:].view("<i8")
        self.token_count = self._check_index(sequences)
        self._tokens = map_file(self._bin_path, random_access).view(self.dtype)

    def _suggestion(self) -> str:
        matches = sorted(Path(self.prefix).parent.glob(f"{Path(self.prefix).name}*_document.idx"))
        if matches:
            return f"; did you mean {str(matches[0]).removesuffix('.idx')}?"
        return "; give the path of a data set without .bin or .idx, as tools/preprocess_data.py wrote it"

    def _read_header(self) -> tuple[np.dtype, int]:
        size = len(self._index)
        if size < HEADER.size:
            raise ValueError(f"{self._idx_path} is {size} bytes long, too short for an index: write the data set again")
        magic, version, code, sequences, documents = HEADER.unpack(self._index[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(f"{self._idx_path} is not an index of Megatron's mmap format (magic {magic!r})")
        if version != VERSION:
            raise ValueError(f"{self._idx_path} has version {version}; only version {VERSION} can be read")
        if code not in DTYPES:
            raise ValueError(f"{self._idx_path} has an unknown token type code {code}")
        expected = HEADER.size + 12 * sequences + 8 * documents
        if size != expected or documents < 1:
            raise ValueError(
                f"{self._idx_path} is {size} bytes long, but {sequences} sequences and {documents} document indices "
                f"take {expected}: write the data set again"
            )
        return DTYPES[code], sequences

    def _check_index(self, sequences: int) -> int:
        """Check that lengths, offsets, document indices and the size of `.bin` agree; returns the token count."""
        position = 0
        for block in blocks(sequences):
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
            # compared, not subtracted: a difference of 64-bit numbers may overflow
            or any(np.any(documents[1:][block] < documents[:-1][block]) for block in blocks(len(documents) - 1))
        ):
            raise ValueError(f"{self._idx_path} has document indices that do not rise from 0 to {sequences}")
        size = os.path.getsize(self._bin_path)
        if size != position:
            raise ValueError(f"{self._bin_path} is {size} bytes long, but its .idx describes {position}")
        return position // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> NDArray:
        return self._slice(int(self._offsets[index]), int(self.sequence_lengths[index]), 0, None)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str, bool]]:
        return IndexedDataset, (self.prefix, self._random_access)

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.document_indices) - 1

    def get_document(self, document: int, offset: int = 0, length: int | None = None) -> NDArray:
        """Tokens `[offset, offset + length)` of a document (to its end if no length), as a view of type `dtype`."""
        start, end = (self._byte_offset(int(self.document_indices[document + i])) for i in (0, 1))
        return self._slice(start, (end - start) // self.dtype.itemsize, offset, length)

    def count_tokens(self, start: int, stop: int) -> int:
        """Tokens in the documents `[start, stop)`."""
        first, end = (self._byte_offset(int(self.document_indices[document])) for document in (start, stop))
        return (end - first) // self.dtype.itemsize

    def document_lengths(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens of each of the documents `[start, stop)`. Raises ValueError if one has 2^31 or more."""
        result = np.empty(stop - start, np.int32)
        for block in blocks(stop - start):
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
        """The tokens `[start, stop)` of all sequences, concatenated."""
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
