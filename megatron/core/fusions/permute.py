"""Bringing the tokens of each expert together, and back.

T tokens, K experts a token, R rows sorted by expert; R = T*K unless some pairs have no row here. `gather_rows` and
`combine_rows` are each other's backward, so that neither needs a scatter with atomics and both are repeatable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend
from megatron.core.fusions.native import kernels as native


@dataclass(frozen=True)
class PermutationMap:
    """Which (token, choice) pair is in which row; rows are sorted by expert."""

    row_to_pair_R: Tensor
    """int64: which pair, token * K + choice, each row holds; -1 for an empty row."""
    pair_to_row_TK: Tensor
    """int64: the row of each pair; -1 for a pair without one."""
    offsets_E: Tensor
    """int32: end of each expert's rows."""
    bijective: bool
    """Whether every pair has a row and every row a pair."""

    @property
    def top_k(self) -> int:
        """K, experts a token."""
        return self.pair_to_row_TK.shape[1]


def permutation_map(experts_TK: Tensor, num_experts: int, num_rows: int | None = None) -> PermutationMap:
    """Stable sort of the pairs by expert: int64 `experts_TK`.

    Pairs with an expert outside [0, num_experts) get no row; `num_rows` counts the others, if they are not all.
    """
    bijective = num_rows is None or num_rows == experts_TK.numel()
    if backend.runs_triton_on(experts_TK):
        from megatron.core.fusions.kernels import permute as kernels

        return PermutationMap(*kernels.permutation_map(experts_TK, num_experts, num_rows), bijective)
    flat = experts_TK.reshape(-1)
    if num_rows is not None:
        flat = flat.where((flat >= 0) & (flat < num_experts), num_experts)  # sorted behind all others
    row_to_pair = torch.argsort(flat, stable=True)[:num_rows]
    pair_to_row = torch.full_like(flat, -1)
    pair_to_row[row_to_pair] = torch.arange(row_to_pair.numel(), device=flat.device)
    numbers = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(flat[row_to_pair], numbers, right=True).to(torch.int32)
    return PermutationMap(row_to_pair, pair_to_row.view_as(experts_TK), offsets, bijective)


def _moved(index: PermutationMap, shift_TK: Tensor, has_row_TK: Tensor, ends_E: Tensor, rows: int) -> PermutationMap:
    """The pairs that have a row so many rows further, among `rows` of which the others are empty."""
    moved_TK = torch.where(has_row_TK, index.pair_to_row_TK + shift_TK, -1)
    row_to_pair = torch.full((rows + 1,), -1, device=moved_TK.device)  # one more, for pairs without a row
    row_to_pair[torch.where(has_row_TK, moved_TK, rows).reshape(-1)] = torch.arange(
        moved_TK.numel(), device=moved_TK.device
    )
    return PermutationMap(row_to_pair[:rows], moved_TK, ends_E.to(torch.int32), bijective=False)


def pad_rows(index: PermutationMap, experts_TK: Tensor, rows_per_expert: int) -> PermutationMap:
    """The same with empty rows until every expert has `rows_per_expert`, which none may exceed.

    `index` may have been made of `experts_TK` without `num_rows`; so nothing has to wait for the device.
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


def gather(x_TH: Tensor, index: PermutationMap) -> Tensor:
    """The token of each row, zero for empty rows: [T, H] -> [R, H]; not differentiable."""
    if backend.runs_triton(x_TH):
        from megatron.core.fusions.kernels import permute as kernels

        return kernels.gather(x_TH.contiguous(), index.row_to_pair_R, index.top_k)
    pairs = index.row_to_pair_R
    if x_TH.shape[0] == 0:
        return x_TH.new_zeros(pairs.shape[0], *x_TH.shape[1:])
    if backend.runs_native(x_TH):
        return native.gather(x_TH.contiguous(), pairs, index.top_k)
    rows = x_TH[pairs if index.top_k == 1 else pairs // index.top_k]
    return rows if index.bijective else rows.masked_fill_((pairs < 0).unsqueeze(-1), 0)


def combine(y_RH: Tensor, index: PermutationMap) -> Tensor:
    """The sum of each token's rows, in float32 or wider: [R, H] -> [T, H]; not differentiable."""
    if backend.runs_triton(y_RH):
        from megatron.core.fusions.kernels import permute as kernels

        return kernels.combine(y_RH.contiguous(), index.pair_to_row_TK)
    rows = index.pair_to_row_TK
    if y_RH.shape[0] == 0:
        return y_RH.new_zeros(rows.shape[0], *y_RH.shape[1:])
    if backend.runs_native(y_RH):
        return native.combine(y_RH.contiguous(), rows)
    parts = y_RH[rows]
    if not index.bijective:
        parts.masked_fill_((rows < 0).unsqueeze(-1), 0)
    if index.top_k == 1:
        return parts.squeeze(1)
    return parts.sum(dim=1, dtype=torch.promote_types(y_RH.dtype, torch.float32)).to(y_RH.dtype)


def gather_weights(probs_TK: Tensor, index: PermutationMap) -> Tensor:
    """The probability of each row, zero for empty rows: [T, K] -> [R]; not differentiable."""
    pairs = index.row_to_pair_R
    if probs_TK.shape[0] == 0:
        return probs_TK.new_zeros(pairs.shape)
    probs_R = probs_TK.reshape(-1)[pairs]
    return probs_R if index.bijective else probs_R.masked_fill_(pairs < 0, 0)


def scatter_weights(probs_R: Tensor, index: PermutationMap) -> Tensor:
    """The number of each pair's row, zero for pairs without one: [R] -> [T, K]; not differentiable."""
    rows = index.pair_to_row_TK
    if probs_R.shape[0] == 0:
        return probs_R.new_zeros(rows.shape)
    probs_TK = probs_R[rows]
    return probs_TK if index.bijective else probs_TK.masked_fill_(rows < 0, 0)


Operation = Callable[[Tensor, PermutationMap], Tensor]


class _Permute(Function):
    """A linear operation along a permutation map, and its transpose for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: PermutationMap, operation: Operation, transpose: Operation) -> Tensor:
        # in autograd's care, so that recomputation and other hooks on what is kept see it
        ctx.save_for_backward(index.row_to_pair_R, index.pair_to_row_TK, index.offsets_E)
        ctx.bijective, ctx.transpose = index.bijective, transpose
        return operation(x, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        row_to_pair, pair_to_row, offsets = ctx.saved_tensors
        index = PermutationMap(row_to_pair, pair_to_row, offsets, ctx.bijective)
        return ctx.transpose(grads[0], index), None, None, None


def gather_rows(x_TH: Tensor, index: PermutationMap) -> Tensor:
    """Copies each token to the rows of its K experts: [T, H] -> [R, H]; empty rows are zero."""
    return _Permute.apply(x_TH, index, gather, combine)


def combine_rows(y_RH: Tensor, index: PermutationMap) -> Tensor:
    """Sums the rows of each token, in float32 or wider: [R, H] -> [T, H]."""
    return _Permute.apply(y_RH, index, combine, gather)


def gather_probs(probs_TK: Tensor, index: PermutationMap) -> Tensor:
    """The probability of each row: [T, K] -> [R]; zero for empty rows."""
    return _Permute.apply(probs_TK, index, gather_weights, scatter_weights)
