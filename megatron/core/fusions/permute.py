"""Bringing the tokens of each expert together, and back.

T tokens, K experts a token, R = T*K rows sorted by expert. `gather_rows` and `combine_rows` are each other's backward,
so that neither needs a scatter with atomics and both are repeatable.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend


@dataclass(frozen=True)
class PermutationMap:
    """The bijection between (token, choice) pairs and rows sorted by expert."""

    row_to_pair_R: Tensor
    """int64: which pair, token * K + choice, each row holds."""
    pair_to_row_TK: Tensor
    """int64: the row of each pair."""
    offsets_E: Tensor
    """int32: end of each expert's rows."""

    @property
    def top_k(self) -> int:
        """K, experts a token."""
        return self.pair_to_row_TK.shape[1]


def permutation_map(experts_TK: Tensor, num_experts: int) -> PermutationMap:
    """Stable sort of the pairs by expert: int64 `experts_TK` with values in [0, num_experts)."""
    if backend.runs_triton_on(experts_TK):
        from megatron.core.fusions.kernels import permute as kernels

        return PermutationMap(*kernels.permutation_map(experts_TK, num_experts))
    flat = experts_TK.reshape(-1)
    row_to_pair = torch.argsort(flat, stable=True)
    pair_to_row = torch.empty_like(row_to_pair)
    pair_to_row[row_to_pair] = torch.arange(row_to_pair.numel(), device=flat.device)
    numbers = torch.arange(num_experts, device=flat.device)
    offsets = torch.searchsorted(flat[row_to_pair], numbers, right=True).to(torch.int32)
    return PermutationMap(row_to_pair, pair_to_row.view_as(experts_TK), offsets)


def _gather(x_TH: Tensor, index: PermutationMap) -> Tensor:
    if backend.runs_triton(x_TH):
        from megatron.core.fusions.kernels import permute as kernels

        return kernels.gather(x_TH.contiguous(), index.row_to_pair_R, index.top_k)
    return x_TH[index.row_to_pair_R // index.top_k]


def _combine(y_RH: Tensor, index: PermutationMap) -> Tensor:
    if backend.runs_triton(y_RH):
        from megatron.core.fusions.kernels import permute as kernels

        return kernels.combine(y_RH.contiguous(), index.pair_to_row_TK)
    wide = torch.promote_types(y_RH.dtype, torch.float32)
    return y_RH[index.pair_to_row_TK].sum(dim=1, dtype=wide).to(y_RH.dtype)


class _GatherRows(Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, index: PermutationMap) -> Tensor:
        ctx.index = index
        return _gather(x_TH, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _combine(grads[0], ctx.index), None


class _CombineRows(Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, index: PermutationMap) -> Tensor:
        ctx.index = index
        return _combine(y_RH, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.index), None


def gather_rows(x_TH: Tensor, index: PermutationMap) -> Tensor:
    """Copies each token to the rows of its K experts: [T, H] -> [R, H]."""
    return _GatherRows.apply(x_TH, index)


def combine_rows(y_RH: Tensor, index: PermutationMap) -> Tensor:
    """Sums the K rows of each token, in float32 or wider: [R, H] -> [T, H]."""
    return _CombineRows.apply(y_RH, index)


def gather_probs(probs_TK: Tensor, index: PermutationMap) -> Tensor:
    """The probability of each row: [T, K] -> [R]."""
    return probs_TK.reshape(-1)[index.row_to_pair_R]
