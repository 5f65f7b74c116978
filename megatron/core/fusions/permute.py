"""Bringing the tokens of each expert together, and back.

T tokens, K experts a token, R rows sorted by expert; R = T*K unless some pairs have no row here. Gathering and
combining are each other's transpose, so that neither needs a scatter with atomics, and both are repeatable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions.forms import operation


@dataclass(frozen=True)
class PermutationMap:
    """Which (token, choice) pair is in which row; rows are sorted by expert."""

    row_to_pair_R: Tensor
    """int64: which pair, token * K + choice, each row holds; -1 for an empty row."""
    pair_to_row_TK: Tensor
    """int64: the row of each pair; -1 for a pair without one."""
    offsets_E: Tensor
    """int32: end of each expert's rows."""


@operation
def sort_pairs(experts_TK: Tensor, num_experts: int, num_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three of a `PermutationMap`, see `permutation_map`."""
    flat = experts_TK.reshape(-1)
    flat = flat.where((flat >= 0) & (flat < num_experts), num_experts)  # sorted behind all others
    row_to_pair = torch.argsort(flat, stable=True)[:num_rows]
    pair_to_row = torch.full_like(flat, -1)
    pair_to_row[row_to_pair] = torch.arange(row_to_pair.numel(), device=flat.device)
    numbers = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(flat[row_to_pair], numbers, right=True).to(torch.int32)
    return row_to_pair, pair_to_row.view_as(experts_TK), offsets


def permutation_map(experts_TK: Tensor, num_experts: int, num_rows: int | None = None) -> PermutationMap:
    """Stable sort of the pairs by expert: int64 `experts_TK`.

    Pairs with an expert outside [0, num_experts) get no row; `num_rows` counts the others, if they are not all.
    """
    return PermutationMap(*sort_pairs(experts_TK, num_experts, num_rows))


def _moved(index: PermutationMap, shift_TK: Tensor, has_row_TK: Tensor, ends_E: Tensor, rows: int) -> PermutationMap:
    """The pairs that have a row so many rows further, among `rows` of which the others are empty."""
    moved_TK = torch.where(has_row_TK, index.pair_to_row_TK + shift_TK, -1)
    row_to_pair = torch.full((rows + 1,), -1, device=moved_TK.device)  # one more, for pairs without a row
    row_to_pair[torch.where(has_row_TK, moved_TK, rows).reshape(-1)] = torch.arange(
        moved_TK.numel(), device=moved_TK.device
    )
    return PermutationMap(row_to_pair[:rows], moved_TK, ends_E.to(torch.int32))


def pad_rows(index: PermutationMap, experts_TK: Tensor, rows_per_expert: int) -> PermutationMap:
    """The same with empty rows until every expert has `rows_per_expert`, which none may exceed.

    `index` need not have been given `num_rows`; so nothing has to wait for the device.
    """
    num_experts, device = index.offsets_E.numel(), experts_TK.device
    starts_E = torch.cat((index.offsets_E.new_zeros(1), index.offsets_E[:-1]))
    numbers_E = torch.arange(num_experts, device=device)
    shift_E = numbers_E * rows_per_expert - starts_E
    has_row = (experts_TK >= 0) & (experts_TK < num_experts)
    shift_TK = shift_E[experts_TK.clamp(0, num_experts - 1)]
    return _moved(index, shift_TK, has_row, (numbers_E + 1) * rows_per_expert, num_experts * rows_per_expert)


def align_rows(index: PermutationMap, multiple: int) -> PermutationMap:
    """The same with empty rows until the number of every expert's rows is a multiple; waits for the device."""
    counts_E = index.offsets_E.diff(prepend=index.offsets_E.new_zeros(1)).to(torch.int64)
    aligned_E = (counts_E + multiple - 1) // multiple * multiple
    if torch.equal(counts_E, aligned_E):
        return index
    ends_E = aligned_E.cumsum(dim=0)
    starts_E = index.offsets_E - counts_E
    shift_R = (ends_E - aligned_E - starts_E).repeat_interleave(counts_E)
    rows_TK = index.pair_to_row_TK
    return _moved(index, shift_R[rows_TK.clamp(min=0)], rows_TK >= 0, ends_E, int(ends_E[-1]))


@operation
def gather_pairs(x_TH: Tensor, row_to_pair_R: Tensor, top_k: int) -> Tensor:
    """The token of each row's pair, zero where that is -1: [T, H] -> [R, H]."""
    return F.pad(x_TH, (0, 0, 0, 1))[row_to_pair_R // top_k]  # -1 // K is the last row, which is zero


@operation
def combine_pairs(y_RH: Tensor, pair_to_row_TK: Tensor) -> Tensor:
    """The sum of each token's rows but those that are -1, in float32 or wider: [R, H] -> [T, H] in y's type."""
    wide = torch.promote_types(y_RH.dtype, torch.float32)
    return F.pad(y_RH, (0, 0, 0, 1))[pair_to_row_TK].sum(dim=1, dtype=wide).to(y_RH.dtype)


def gather(x_TH: Tensor, index: PermutationMap) -> Tensor:
    """The token of each row, zero for empty rows: [T, H] -> [R, H]; not differentiable."""
    return gather_pairs(x_TH.contiguous(), index.row_to_pair_R, index.pair_to_row_TK.shape[1])


def combine(y_RH: Tensor, index: PermutationMap) -> Tensor:
    """The sum of each token's rows, in float32 or wider: [R, H] -> [T, H]; not differentiable."""
    return combine_pairs(y_RH.contiguous(), index.pair_to_row_TK)


def gather_weights(probs_TK: Tensor, index: PermutationMap) -> Tensor:
    """The probability of each row, zero for empty rows: [T, K] -> [R]; not differentiable."""
    return F.pad(probs_TK.reshape(-1), (0, 1))[index.row_to_pair_R]


def scatter_weights(probs_R: Tensor, index: PermutationMap) -> Tensor:
    """The value at each pair's row, zero for pairs without one: [R] -> [T, K]; not differentiable."""
    return F.pad(probs_R, (0, 1))[index.pair_to_row_TK]


Move = Callable[[Tensor, PermutationMap], Tensor]


class _Permute(Function):
    """A linear operation along a permutation map, and its transpose for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: PermutationMap, move: Move, transpose: Move) -> Tensor:
        # in autograd's care, so that recomputation and other hooks on what is kept see it
        ctx.save_for_backward(index.row_to_pair_R, index.pair_to_row_TK, index.offsets_E)
        ctx.transpose = transpose
        return move(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grads[0], PermutationMap(*ctx.saved_tensors)), None, None, None


def gather_rows(x_TH: Tensor, index: PermutationMap) -> Tensor:
    """Copies each token to the rows of its K experts: [T, H] -> [R, H]; empty rows are zero."""
    return _Permute.apply(x_TH, index, gather, combine)


def combine_rows(y_RH: Tensor, index: PermutationMap) -> Tensor:
    """Sums the rows of each token, in float32 or wider: [R, H] -> [T, H]."""
    return _Permute.apply(y_RH, index, combine, gather)


def gather_probs(probs_TK: Tensor, index: PermutationMap) -> Tensor:
    """The probability of each row: [T, K] -> [R]; zero for empty rows."""
    return _Permute.apply(probs_TK, index, gather_weights, scatter_weights)
