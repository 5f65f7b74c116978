"""Softmax statistics of logits, and their gradient in place: no second tensor of their size is made.

N tokens, V columns of the vocabulary on this rank or a block of them, of which the first `columns` are real and the
rest padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core.fusions import backend
from megatron.core.fusions.native import kernels as native


class SoftmaxStatistics(NamedTuple):
    """What a softmax needs to know of some columns; [N] each, float32, or float64 for float64 logits."""

    largest: Tensor
    """Largest logit; -inf without any real column."""
    total: Tensor
    """Sum of exp(logit - largest); 0 without any real column."""
    target: Tensor
    """Logit of the target, or 0 if it is in other columns."""

    @property
    def logsumexp(self) -> Tensor:
        """log sum exp of the logits."""
        return self.largest + self.total.log()

    def merge(self, other: "SoftmaxStatistics") -> "SoftmaxStatistics":
        """Those of the columns of both; one of them must have a real column."""
        largest = torch.maximum(self.largest, other.largest)
        total = self.total * (self.largest - largest).exp() + other.total * (other.largest - largest).exp()
        return SoftmaxStatistics(largest, total, self.target + other.target)


def softmax_statistics(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[SoftmaxStatistics, Tensor]:
    """The statistics, and [N, V] like the logits: what `softmax_gradient_` needs; the logits may not be used again.

    `ids_N` (int64) are the targets, counted from the first column.
    """
    if backend.runs_triton(logits_NV):
        from megatron.core.fusions.kernels import cross_entropy as kernels

        return SoftmaxStatistics(*kernels.statistics(logits_NV, ids_N, columns)), logits_NV
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    if not columns or not logits_NV.shape[0]:
        zero = logits_NV.new_zeros(logits_NV.shape[0], dtype=wide)
        return SoftmaxStatistics(torch.full_like(zero, float("-inf")), zero, zero), logits_NV
    if backend.runs_native(logits_NV):
        return SoftmaxStatistics(*native.softmax_statistics(logits_NV, ids_N, columns)), logits_NV
    real = logits_NV[:, :columns]
    # torch's softmax goes over each row once, while it is in the processor's cache
    softmax = torch.softmax(real, dim=1, dtype=wide)
    largest, total = real.amax(dim=1).to(wide), softmax.amax(dim=1).reciprocal_()  # exp(0) / sum is the largest
    elsewhere = (ids_N < 0) | (ids_N >= columns)
    target = real.gather(1, ids_N.masked_fill(elsewhere, 0).unsqueeze(1)).squeeze(1).to(wide).masked_fill_(elsewhere, 0)
    if columns < logits_NV.shape[1]:
        real.copy_(softmax)
        return SoftmaxStatistics(largest, total, target), logits_NV
    return SoftmaxStatistics(largest, total, target), softmax.to(logits_NV.dtype)


def softmax_gradient_(
    kept_NV: Tensor, own_logsumexp_N: Tensor, ids_N: Tensor, logsumexp_N: Tensor, grad_N: Tensor, columns: int
) -> None:
    """Overwrites what `softmax_statistics` gave with (softmax - one_hot(target)) * grad, and with 0 in padding columns.

    `own_logsumexp_N` is that of these columns, `logsumexp_N` that of all, in other blocks and on other ranks too.
    """
    if backend.runs_triton(kept_NV):
        from megatron.core.fusions.kernels import cross_entropy as kernels

        kernels.gradient_(kept_NV, ids_N, logsumexp_N, grad_N, columns)
        return
    if columns and backend.runs_native(kept_NV):
        native.softmax_gradient_(kept_NV, own_logsumexp_N, ids_N, logsumexp_N, grad_N.contiguous(), columns)
        return
    kept_NV[:, columns:] = 0
    if not columns:
        return
    real = kept_NV[:, :columns]
    # from a softmax of these columns to one of all
    torch.mul(real, ((own_logsumexp_N - logsumexp_N).exp() * grad_N).unsqueeze(1), out=real)
    elsewhere = (ids_N < 0) | (ids_N >= columns)
    one_hot = grad_N.masked_fill(elsewhere, 0).neg().to(real.dtype)
    real.scatter_add_(1, ids_N.masked_fill(elsewhere, 0).unsqueeze(1), one_hot.unsqueeze(1))
