"""The weights of a model as a table, from which layers, checkpoints, counts and traffic are computed.

Every weight is one `WeightRule`: its shape, how it is cut over tensor-parallel ranks, its initial values, and the
Hugging Face tensors it is made of. A row of a `WeightTable` is the rule of a weight that each layer, or each expert of
each layer, has: `{layer}` and `{expert}` in its names stand for their numbers. Names are global: layers are numbered
through the whole model. Any rows of a matrix are made of some rows of its sources, and belong to one rank's part or to
the same rows of every part, so that tools can move a model a few rows at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from megatron.core.stages import Stage, whole_model


@dataclass(frozen=True)
class HuggingFaceTensor:
    """A tensor of a Hugging Face checkpoint in its spelling on disk, and where transformers 5 keeps it."""

    name: str
    """Name on disk (`block_sparse_moe`, one tensor a projection of an expert)."""
    shape: tuple[int, ...]
    """Shape under that name."""
    fused_name: str
    """Name in transformers 5's spelling; the same where that did not change."""
    fused_shape: tuple[int, ...]
    """Shape under that name: experts are stacked, gate above up."""
    expert: int | None = None
    """Index into the stack, None if the fused tensor is not a stack."""
    first_row: int = 0
    """Row of the stacked matrix where this tensor begins."""

    def at(self, layer: int, expert: int | None) -> "HuggingFaceTensor":
        """The tensor of one layer, and of one expert if it is one of the experts'."""
        name, fused_name = (name.format(layer=layer, expert=expert) for name in (self.name, self.fused_name))
        return replace(self, name=name, fused_name=fused_name, expert=expert)


@dataclass(frozen=True)
class WeightRule:
    """One weight of the Megatron model, as cut by `megatron.core.tensor_parallel.partition`, or a row of its table."""

    name: str
    """Global Megatron name."""
    sources: tuple[HuggingFaceTensor, ...]
    """Hugging Face tensors it is made of, in order."""
    layer: int | None = None
    """Transformer layer it belongs to, counted through the whole model."""
    expert: int | None = None
    """Expert it belongs to, counted through the layer."""
    partition_dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks; None if every rank holds it whole."""
    partition_stride: int = 1
    """Blocks along that dimension that are cut by themselves (2 for gate and up)."""
    groups: int = 1
    """Row groups: each source has this many, and group g of all sources come before group g + 1 of any."""
    padded_rows: int | None = None
    """Rows after padding of a weight with a row for each vocabulary entry; None for other weights."""
    init_std: float | None = None
    """Standard deviation of its initial values; None for ones."""

    def at(self, layer: int, expert: int | None = None) -> "WeightRule":
        """The rule of one weight, if this is a row of the table: that of one layer, and of one expert if of experts."""
        sources = tuple(source.at(layer, expert) for source in self.sources)
        return replace(self, name=self.name_at(layer, expert), sources=sources, layer=layer, expert=expert)

    def name_at(self, layer: int, expert: int | None = None) -> str:
        """Megatron's name of that weight."""
        return self.name.format(layer=layer, expert=expert)

    @property
    def is_expert(self) -> bool:
        """Whether there is one for each expert."""
        return self.expert is not None or "{expert}" in self.name

    @property
    def elements(self) -> int:
        """Elements without vocabulary padding."""
        return sum(math.prod(source.shape) for source in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, vocabulary padding included."""
        rows = self.padded_rows or sum(source.shape[0] for source in self.sources)
        return (rows, *self.sources[0].shape[1:])

    def part_shape(self, size: int) -> tuple[int, ...]:
        """Shape of a part of `size`. Raises ValueError if the tensor cannot be cut into so many."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            interleaved = len(self.sources) > 1 and self.partition_stride == 1
            units = self.groups if interleaved else shape[self.partition_dim] // self.partition_stride
            if units % size:
                raise ValueError(f"{self.name}: {units} rows, columns or groups are not divisible by {size} ranks")
            shape[self.partition_dim] //= size
        return tuple(shape)

    def chunks(self, parts: int, at_most: int) -> Iterator[range]:
        """Row ranges of the whole tensor, in order, of about `at_most` rows: what is moved at a time.

        None crosses the border between two parts of `parts`, or between two blocks, or divides a group.
        """
        rows, unit = self.shape[0], self.shape[0] // self.groups if self.groups > 1 else 1
        cells = parts * self.partition_stride if self.partition_dim == 0 else 1
        step = max(at_most // unit, 1) * unit
        for start in range(0, rows, rows // cells):
            for first in range(start, start + rows // cells, step):
                yield range(first, min(first + step, start + rows // cells))

    def owner(self, rows: range, size: int) -> int:
        """Which part of `size` holds `rows` of a tensor that is cut by rows; the rows are as `chunks` gives them."""
        block = self.shape[0] // self.partition_stride
        return rows.start % block // (block // size)

    def part_rows(self, rank: int, size: int) -> list[range]:
        """The rows of the whole tensor that part `rank` of `size` of a tensor cut by rows has, in its order."""
        block = self.shape[0] // self.partition_stride
        length = block // size
        starts = (start + rank * length for start in range(0, self.shape[0], block))
        return [range(start, start + length) for start in starts]

    def source_rows(self, rows: range) -> list[tuple[HuggingFaceTensor, range]]:
        """The rows of the sources that `rows` of the whole tensor are made of; none of vocabulary padding."""
        if self.groups > 1:
            unit = self.shape[0] // self.groups
            assert rows.start % unit == rows.stop % unit == 0, (self.name, rows)
            first, last = rows.start // unit, rows.stop // unit
            per_group = [(source, source.shape[0] // self.groups) for source in self.sources]
            return [(source, range(first * height, last * height)) for source, height in per_group]
        found, start = [], 0
        for source in self.sources:
            low, high = max(rows.start - start, 0), min(rows.stop - start, source.shape[0])
            if low < high:
                found.append((source, range(low, high)))
            start += source.shape[0]
        return found

    def source_views(self, tensor: Any, rows: range | None = None) -> list[Any]:
        """The parts of `tensor`, `rows` of this weight (all, if not given), that `source_rows` names, in its order.

        They are views of the same memory, of as many elements as the source's rows and in their order, so that either
        side can be filled from the other. `tensor` is a numpy array or torch tensor without gaps; rows of vocabulary
        padding are in no part.
        """
        pieces = self.source_rows(range(self.shape[0]) if rows is None else rows)
        groups = len(tensor) * self.groups // self.shape[0] if self.groups > 1 else 1
        blocks = tensor.reshape(groups, -1, *self.shape[1:])
        views, start = [], 0
        for _, part in pieces:
            height = len(part) // groups
            views.append(blocks[:, start : start + height] if groups > 1 else tensor[start : start + height])
            start += height
        return views


@dataclass(frozen=True)
class WeightTable:
    """All weights of a model: each row once, however many layers and experts have such a weight."""

    first: tuple[WeightRule, ...]
    """Of the first stage, in front of all layers: what tokens are looked up in."""
    layer: tuple[WeightRule, ...]
    """Of every layer, in the order of its parameters."""
    last: tuple[WeightRule, ...]
    """Of the last stage, after all layers."""
    num_layers: int
    num_experts: int

    def of_stage(self, stage: Stage) -> Iterator[tuple[WeightRule, int | None]]:
        """The rows of a stage in the order of its parameters, each with the number of its layer in the whole model."""
        yield from ((row, None) for row in self.first if stage.has_embedding)
        yield from ((row, layer) for layer in stage.layers for row in self.layer)
        yield from ((row, None) for row in self.last if stage.has_output)

    def named_weights(self, stage: Stage, experts: range | None = None) -> Iterator[tuple[str, WeightRule]]:
        """Every weight of a stage, one expert after the other, with its name there.

        In such a name layers count from 0, as do the `experts` of a rank (all of them if not given).
        """
        experts = experts or range(self.num_experts)
        for (is_expert, layer), group in groupby(self.of_stage(stage), key=lambda item: (item[0].is_expert, item[1])):
            rows = [row for row, _ in group]
            if layer is None:
                yield from ((row.name, row) for row in rows)
                continue
            for expert in experts if is_expert else (None,):
                here = layer - stage.layers.start, None if expert is None else expert - experts.start
                yield from ((row.name_at(*here), row.at(layer, expert)) for row in rows)

    def weights(self) -> Iterator[WeightRule]:
        """Every weight of the model."""
        return (rule for _, rule in self.named_weights(whole_model(self.num_layers)))

    @property
    def elements(self) -> int:
        """Elements of the whole model without vocabulary padding."""
        of_layer = sum(row.elements * (self.num_experts if row.is_expert else 1) for row in self.layer)
        return self.num_layers * of_layer + sum(row.elements for row in self.first + self.last)
