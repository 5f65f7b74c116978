"""Rows of the tensors in a distributed checkpoint, read chunk by chunk into memory of just their size."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.interchange.stored_tensor import StoredTensor, ZipRecords, stored_tensor
from megatron.core.interchange.torch_archive import Window
from megatron.core.interchange.torch_dist.metadata import Chunk, Place, read_catalog
from megatron.core.interchange.torch_file import index_value


class CheckpointFolder:
    """A distributed checkpoint whose metadata has been checked; each chunk is opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog = read_catalog(folder)
        self._open: dict[Place, StoredTensor] = {}
        self._parts: dict[tuple[str, tuple[int, ...]], list[Chunk]] = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the tensor `key`."""
        return self.catalog.tensors[key].shape

    def dtype(self, key: str) -> str:
        """Type of its elements, such as `bfloat16`."""
        return self.catalog.tensors[key].dtype

    def files(self, key: str, at: tuple[int, ...] = ()) -> list[str]:
        """Names of the files that hold the part of `key` at the indices `at` of its leading axes."""
        return sorted({chunk.place.file for chunk in self._chunks(key, at)})

    def read_into(
        self, target: Array, key: str, at: tuple[int, ...], rows: range, dtype: str, *, in_order: bool = False
    ) -> None:
        """Fills `target` with `rows` of `key` at the indices `at` of its leading axes, as elements of type `dtype`.

        Checksums are compared first, or with the last rows where all of them are read `in_order`; see `StoredTensor`.
        Raises ValueError naming the file if that is damaged or holds something else than the metadata says.
        """
        depth = len(at)
        for chunk in self._chunks(key, at):
            start, *inner = chunk.offsets[depth:]
            size, *widths = chunk.sizes[depth:]
            found = range(max(rows.start, start), min(rows.stop, start + size))
            if len(found) == 0:
                continue
            across = (slice(begin, begin + width) for begin, width in zip(inner, widths, strict=True))
            place = (slice(found.start - rows.start, found.stop - rows.start), *across)
            local = range(found.start - start, found.stop - start)
            self._part(key, chunk, at).read_into(target[place], local, dtype, in_order=in_order)

    def verify(self, keys: Iterable[str], rank: int = 0, size: int = 1) -> None:
        """Compares the checksums of all that `keys` hold, and with what the metadata says of it.

        `size` processes can share the work, each reading its share. Raises ValueError naming the file.
        """
        chunks = [(key, chunk) for key in keys for chunk in self.catalog.tensors[key].chunks]
        chunks.sort(key=lambda entry: entry[1].place)
        total, before = sum(chunk.place.length for _, chunk in chunks), 0
        for key, chunk in chunks:
            if before * size // max(total, 1) == rank:
                found = self._opened(key, chunk)
                assert found.records is not None, chunk.place
                found.records.verify(found.record_offset)
            before += chunk.place.length

    def read_part(self, target: Array, key: str, at: tuple[int, ...], rows: range, columns: range) -> None:
        """Fills `target` with [rows, columns] of the matrix that `key` has at the indices `at` of its leading axes.

        It is of the type of `key`; a vector is a matrix of one column. Checksums are not compared, see `verify`.
        """
        for chunk in self._chunks(key, at):
            top, left = (*chunk.offsets[len(at) :], 0)[:2]
            height, width = (*chunk.sizes[len(at) :], 1)[:2]
            down = range(max(rows.start, top), min(rows.stop, top + height))
            across = range(max(columns.start, left), min(columns.stop, left + width))
            if len(down) == 0 or len(across) == 0:
                continue
            place = target[down.start - rows.start :, across.start - columns.start :][: len(down), : len(across)]
            part, inner = replace(self._part(key, chunk, at), records=None), range(down.start - top, down.stop - top)
            if len(across) == width:
                part.read_into(place, inner, part.dtype)
            else:
                place[...] = part.read(inner).reshape(len(inner), width)[:, across.start - left : across.stop - left]

    def _chunks(self, key: str, at: tuple[int, ...]) -> list[Chunk]:
        """Kept, since rows are read a few at a time and a key may have thousands of chunks."""
        if (key, at) not in self._parts:
            self._parts[key, at] = [
                chunk
                for chunk in self.catalog.tensors[key].chunks
                if all(start <= index < start + size for index, start, size in zip(at, chunk.offsets, chunk.sizes))
            ]
        return self._parts[key, at]

    def _part(self, key: str, chunk: Chunk, at: tuple[int, ...]) -> StoredTensor:
        """What a chunk holds at the indices `at` of the tensor's leading axes."""
        whole = self._opened(key, chunk)
        steps = whole.stride or _strides(whole.shape)
        skip = sum((index - start) * step for index, start, step in zip(at, chunk.offsets, steps))
        return replace(
            whole,
            shape=whole.shape[len(at) :],
            stride=whole.stride[len(at) :] if whole.stride is not None else None,
            offset=whole.offset + skip * STORED_AS[whole.dtype].itemsize,
        )

    def _opened(self, key: str, chunk: Chunk) -> StoredTensor:
        if chunk.place not in self._open:
            path, window = self.folder / chunk.place.file, Window(chunk.place.offset, chunk.place.length)
            found = stored_tensor(path, ZipRecords(path, window), key, index_value(path, window))
            if not isinstance(found, StoredTensor) or (found.shape, found.dtype) != (chunk.sizes, self.dtype(key)):
                raise ValueError(f"{path}: a chunk of {key} is not of the shape and type that .metadata says")
            self._open.setdefault(chunk.place, found)  # another thread may have been faster
        return self._open[chunk.place]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps))
