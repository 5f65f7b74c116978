"""Where the elements of a rank's shard lie in the whole tensor, in one form for every way of cutting.

A tensor that is cut along dimension d in `stride` blocks is seen as a matrix: its rows are all indices before d times
the blocks, its columns the rest. Part `rank` of `size` is then a range of columns of that matrix, whatever d and the
stride are, and a flat range of a part (a ZeRO shard) is at most three rectangles. So everything that is saved or
loaded is rectangles of the same matrix, and going from one layout to another is intersecting them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows and columns of a tensor's matrix, held contiguously (row by row) from element `offset` of some storage."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int
    offset: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.row_end - self.row_begin

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.column_end - self.column_begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * self.columns

    def intersect(self, other: "Block") -> "Block | None":
        """The rectangle that both cover, None if there is none; its offset has no meaning."""
        common = Block(
            max(self.row_begin, other.row_begin),
            min(self.row_end, other.row_end),
            max(self.column_begin, other.column_begin),
            min(self.column_end, other.column_end),
        )
        return common if common.row_begin < common.row_end and common.column_begin < common.column_end else None

    def position(self, row: int, column: int) -> int:
        """Element of the storage that holds (row, column) of the matrix."""
        return self.offset + (row - self.row_begin) * self.columns + column - self.column_begin


def matrix_shape(shape: Sequence[int], partition_dim: int | None, stride: int) -> tuple[int, int]:
    """Rows and columns of the matrix that a tensor of `shape` is seen as."""
    if partition_dim is None:
        return 1, math.prod(shape)
    assert shape[partition_dim] % stride == 0, (shape, partition_dim, stride)
    rows = math.prod(shape[:partition_dim]) * stride
    return rows, math.prod(shape[partition_dim:]) // stride


class Values(Protocol):
    """Flat values to be saved that do not lie in memory as such: tensors of some of them are made when asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Their type in the file."""

    @property
    def device(self) -> torch.device:
        """Where they are made."""

    def numel(self) -> int:
        """How many there are."""

    def __getitem__(self, place: slice) -> Tensor:
        """[stop - start] of them."""


@dataclass(frozen=True, kw_only=True)
class TensorShard:
    """A flat range of one part of a tensor: what a rank saves, or what is loaded into its memory."""

    kind: str
    """What the values are: weight, master, exp_avg, exp_avg_sq, rng."""
    name: str
    """Name in the whole model, with global layer and expert numbers."""
    shape: tuple[int, ...]
    """Shape of the whole tensor, without vocabulary padding."""
    data: Tensor | Values
    """[n], contiguous: elements start ... start + n of the flattened part, vocabulary padding included. To be loaded,
    a tensor."""
    start: int = 0
    partition_dim: int | None = None
    """Dimension the tensor is cut along; None if every part is the whole tensor."""
    stride: int = 1
    """Blocks along that dimension that are each cut apart (2 for gate and up)."""
    rank: int = 0
    size: int = 1
    """The part is number `rank` of `size`."""
    padded_length: int | None = None
    """Length of the cut dimension with the padding that this layout needs; None if it has none."""
    owned: bool = True
    """Whether this rank is the one, of those that hold the same values, that saves them."""

    def blocks(self) -> Iterator[Block]:
        """The rectangles that `data` consists of, with offsets into it; padding is left out."""
        rows, columns = matrix_shape(self.shape, self.partition_dim, self.stride)
        padded = columns
        if self.padded_length is not None:
            assert rows == 1 and self.partition_dim is not None, self.name
            padded = columns // self.shape[self.partition_dim] * self.padded_length
        parts = 1 if self.partition_dim is None else self.size
        assert padded % parts == 0, (self.name, padded, parts)
        width = padded // parts
        first = width * self.rank if parts > 1 else 0
        position, end = self.start, self.start + self.data.numel()
        assert end <= rows * width, (self.name, end, rows, width)
        while position < end:
            row, column = divmod(position, width)
            whole_rows = (end - position) // width if column == 0 else 0
            column_end = width if whole_rows else min(width, column + end - position)
            block = Block(
                row, row + max(1, whole_rows), first + column, min(first + column_end, columns), position - self.start
            )
            if block.columns > 0:
                yield block
            position += max(1, whole_rows) * (column_end - column)

    def parts(self) -> Iterator[tuple[range, range, Tensor]]:
        """The same as rows and columns of the whole tensor, each with its elements of `data`, [rows, columns].

        Rows are those of its first dimension, columns all others together.
        """
        _, width = matrix_shape(self.shape, self.partition_dim, self.stride)
        columns = math.prod(self.shape[1:])
        for block in self.blocks():
            data = self.data[block.offset : block.offset + block.numel]
            if width == columns:
                rows, across = range(block.row_begin, block.row_end), range(block.column_begin, block.column_end)
                yield rows, across, data.view(block.rows, block.columns)
                continue
            for number, row in enumerate(range(block.row_begin, block.row_end)):  # which is a run of elements
                run = data[number * block.columns : (number + 1) * block.columns]
                yield from _rows_of_run(run, row * width + block.column_begin, columns)


def _rows_of_run(run: Tensor, begin: int, columns: int) -> Iterator[tuple[range, range, Tensor]]:
    """The rows and columns of a matrix that consecutive elements from `begin` on are."""
    position = 0
    while position < len(run):
        row, column = divmod(begin + position, columns)
        whole_rows = (len(run) - position) // columns if column == 0 else 0
        rows, end = max(1, whole_rows), columns if whole_rows else min(columns, column + len(run) - position)
        size = rows * (end - column)
        yield range(row, row + rows), range(column, end), run[position : position + size].view(rows, end - column)
        position += size


def missing_elements(blocks: Sequence[Block], rows: int, columns: int) -> int:
    """How many elements of a matrix `blocks` leave out in sum; -1 if one is covered twice or lies outside.

    Where blocks overlap and others are missing, it is the difference of both, or -1 if that is not positive.
    """
    missing = rows * columns
    corners: set[int] = set()  # those of an odd number of blocks
    for block in blocks:
        inside = 0 <= block.row_begin < block.row_end <= rows and 0 <= block.column_begin < block.column_end <= columns
        if not inside:
            return -1
        missing -= block.numel
        corners ^= _corners(block, columns)
    if missing:
        return max(missing, -1)
    # Corners as of one block that covers everything: every element is in an odd number of blocks, so in one or more,
    # and by their sum in one. That holds without comparing blocks with each other, of which there may be very many.
    return 0 if not blocks or corners == _corners(Block(0, rows, 0, columns), columns) else -1


def _corners(block: Block, columns: int) -> set[int]:
    rows = (block.row_begin * (columns + 1), block.row_end * (columns + 1))
    return {row + column for row in rows for column in (block.column_begin, block.column_end)}


def view_of(data: Tensor, block: Block, part: Block) -> Tensor:
    """[rows, columns] view of the elements of `part` in storage that holds `block`."""
    whole = data[block.offset : block.offset + block.numel].view(block.rows, block.columns)
    rows = slice(part.row_begin - block.row_begin, part.row_end - block.row_begin)
    return whole[rows, part.column_begin - block.column_begin : part.column_end - block.column_begin]


DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.uint8: "U8",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
