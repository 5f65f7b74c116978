"""Linear layers and the embedding, split over the tensor-parallel ranks.

Shapes: S sequence, B batch, H input width, O output width, V padded vocabulary; `/tp` marks a split axis. With sequence
parallelism, activations outside the tensor-parallel regions are [S/tp, B, H].
"""

from typing import ClassVar

from torch import Tensor, nn

from megatron.core.fusions.embedding import lookup
from megatron.core.fusions.linear import linear
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.column_parallel import column_parallel_linear
from megatron.core.tensor_parallel.cross_entropy import output_cross_entropy
from megatron.core.tensor_parallel.parameter import ParameterSpec, Placement, new_parameter


class _SplitWeight(nn.Module):
    """A weight of which each tensor-parallel rank has a part."""

    partition_dim: ClassVar[int]

    def __init__(self, spec: ParameterSpec, placement: Placement) -> None:
        super().__init__()
        assert spec.partition_dim == self.partition_dim, spec
        self.group, self.sequence_parallel = placement.group, placement.sequence_parallel
        self.weight = new_parameter(spec, placement)


class ColumnParallelLinear(_SplitWeight):
    """y = x W^T with the rows of W split: x [S, B, H] (or [S/tp, B, H]) -> y [S, B, O/tp]."""

    partition_dim = 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns this rank's output columns."""
        return column_parallel_linear(x, self.weight, self.group, self.sequence_parallel)


class VocabParallelOutput(ColumnParallelLinear):
    """The output layer, split by vocabulary entry: logits, or straight to each token's loss."""

    def __init__(self, spec: ParameterSpec, placement: Placement) -> None:
        super().__init__(spec, placement)
        assert spec.init_rows is not None, spec
        self.vocab_size = spec.init_rows

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """x [S, B, H] (or [S/tp, B, H]) -> loss of int64 `targets` [S, B]; without them logits [S, B, vocabulary]."""
        if targets is not None:
            return output_cross_entropy(x, self.weight, targets, self.vocab_size, self.group, self.sequence_parallel)
        return mappings.gather_last(super().forward(x), self.group)[..., : self.vocab_size]


class RowParallelLinear(_SplitWeight):
    """y = x W^T with the columns of W split: x [S, B, H/tp] -> y [S, B, O] (or [S/tp, B, O]), summed over ranks."""

    partition_dim = 1

    def forward(self, x: Tensor) -> Tensor:
        """Returns the complete output, or this rank's slice of the sequence."""
        y = linear(x, self.weight)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel(y, self.group)
        return mappings.reduce_from_tensor_parallel(y, self.group)


class VocabParallelEmbedding(_SplitWeight):
    """Rows of the embedding table split by token id: tokens [B, S] -> [S, B, H] (or [S/tp, B, H])."""

    partition_dim = 0

    def __init__(self, spec: ParameterSpec, placement: Placement) -> None:
        super().__init__(spec, placement)
        self.rows = spec.global_shape[0] // self.group.size
        self.first_row = self.rows * self.group.rank

    def forward(self, tokens: Tensor) -> Tensor:
        """Looks up int64 `tokens` [B, S]; ids that other ranks hold contribute zero here and are summed in."""
        ids = tokens.t() - self.first_row
        if self.group.size == 1:
            return lookup(ids, self.weight)
        elsewhere = (ids < 0) | (ids >= self.rows)
        vectors = lookup(ids.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere.unsqueeze(-1), 0)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel(vectors, self.group)
        return mappings.reduce_from_tensor_parallel(vectors, self.group)
