"""Writing an indexed data set (see `indexed_dataset` for its format), so that it is whole or not there at all."""

import fcntl
import hashlib
import logging
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron.core.atomic_files import append, naming, sync_file, sync_folder
from megatron.core.datasets.description import (
    DatasetDescription,
    Origin,
    description_path,
    file_sha256,
    read_description,
)
from megatron.core.datasets.indexed_dataset import BLOCK, CODES, DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, blocks

logger = logging.getLogger(__name__)


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
        raise ValueError(f"{path} is shorter than the {size} bytes to continue from: start from scratch")
    file.truncate(size)
    return file


class WriterState(NamedTuple):
    """How much a writer has on disk; a new writer of the same prefix can continue from it."""

    sequences: int = 0
    documents: int = 0
    tokens: int = 0


NOTHING = WriterState()


class IndexedDatasetWriter:
    """Writes a data set to temporary files next to `prefix` and gives them their names only when it is complete.

    Memory does not grow with the data: lengths and document indices are streamed to disk. Leaving the `with` block
    by an exception, or never calling `finalize`, leaves nothing behind unless `suspend` was called; a killed process
    leaves only `*.tmp` files, which the next writer of the same prefix reuses, or continues from a `checkpoint`.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: DTypeLike, start: WriterState = NOTHING) -> None:
        self.prefix = os.fspath(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise ValueError(f"token type {dtype} is not one of {', '.join(d.name for d in DTYPES.values())}")
        self.sequence_count, self.document_count, self.token_count = start
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        sizes = {
            "bin": start.tokens * self.dtype.itemsize,
            "idx": HEADER.size + 4 * start.sequences,
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
            append(self._idx, bytes(HEADER.size))
            append(self._documents, struct.pack("<q", 0))
        else:
            self._bin.seek(0)
            while block := self._bin.read(8 * BLOCK):
                self._digest.update(block)
        self._open = True

    def add_document(self, ids: Sequence[int] | NDArray) -> None:
        """Append one document of one sequence. Raises ValueError if an id does not fit the token type."""
        self.add_documents(ids, [len(ids)])

    def add_documents(self, ids: Sequence[int] | NDArray, lengths: Sequence[int] | NDArray) -> None:
        """Append documents of one sequence each: `ids` back to back, `lengths` tokens apiece."""
        array = np.asarray(ids)
        assert array.ndim == 1 and len(array) == np.sum(lengths, dtype=np.int64), (array.shape, lengths)
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
        append(self._idx, np.asarray(lengths, dtype="<i4").tobytes())
        ends = np.arange(self.sequence_count + 1, self.sequence_count + len(lengths) + 1, dtype="<i8")
        append(self._documents, ends.tobytes())
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
            while block := source.read(8 * BLOCK):
                self._write_tokens(block)
                if description:
                    digest.update(block)
        if description and digest.hexdigest() != description.sha256.get("bin"):
            raise ValueError(
                f"{other.prefix}.bin has changed since it was written (its SHA-256 is not the description's)"
            )
        for part in blocks(len(other)):
            append(self._idx, other.sequence_lengths[part].astype("<i4").tobytes())
        ends = other.document_indices[1:]
        for part in blocks(len(ends)):
            append(self._documents, (ends[part] + self.sequence_count).astype("<i8").tobytes())
        self._count(len(other), len(ends), other.token_count)

    def _write_tokens(self, content: bytes | memoryview) -> None:
        append(self._bin, content)
        self._digest.update(content)

    def _count(self, sequences: int, documents: int, tokens: int) -> None:
        self.sequence_count += sequences
        self.document_count += documents
        self.token_count += tokens

    def checkpoint(self) -> WriterState:
        """Bring everything to disk; returns the state from which another writer can continue after a kill."""
        for file in self._files.values():
            sync_file(file)
        return WriterState(self.sequence_count, self.document_count, self.token_count)

    def finalize(self, origin: Origin | None = None, source: dict[str, Any] | None = None) -> None:
        """Complete both files, flush them to disk and give them their names, `.bin` first and `.idx` last.

        An older `.idx` of that name is removed before, so that at no moment an index meets another run's tokens. With
        an `origin` a description is written with them, which also lists the `source` files; without one, an older
        description is removed.
        """
        assert self._open, "the writer is already closed"
        self._write_offsets()
        self._documents.seek(0)
        with naming(Path(self._idx.name)):
            shutil.copyfileobj(self._documents, self._idx, 8 * BLOCK)
            self._idx.flush()
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.sequence_count, self.document_count + 1)
        os.pwrite(self._header_descriptor(), header, 0)
        for file in (self._bin, self._idx):
            sync_file(file)
        checksums = {"bin": self._digest.hexdigest(), "idx": file_sha256(self._idx.name)}
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        description_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._bin.name, f"{self.prefix}.bin")
        if origin:
            counts = {"documents": self.document_count, "tokens": self.token_count, "dtype": self.dtype.name}
            DatasetDescription(**origin._asdict(), **counts, sha256=checksums, input=source).write(self.prefix)
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
        for block in blocks(self.sequence_count):
            count = block.stop - block.start
            raw = os.pread(self._idx.fileno(), 4 * count, HEADER.size + 4 * block.start)
            ends = np.cumsum(np.frombuffer(raw, "<i4"), dtype=np.int64) * self.dtype.itemsize + position
            offsets = np.empty(count, "<i8")
            offsets[0], offsets[1:] = position, ends[:-1]
            append(self._idx, offsets.tobytes())
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

    def __exit__(self, *error: object) -> None:
        self.abort()
