"""Softmax statistics of logits, and their gradient in place: no second tensor of their size is made.

N tokens, V columns of the vocabulary on this rank or a block of them, of which the first `columns` are real and the
rest padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.forms import operation


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


@operation
def softmax_statistics_(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three of `SoftmaxStatistics`; the logits may be overwritten by what `softmax_gradient_` needs of them.

    `ids_N` (int64) are the targets, counted from the first column.
    """
    real = logits_NV[:, :columns].to(torch.promote_types(logits_NV.dtype, torch.float32))
    largest = F.pad(real, (0, 1), value=float("-inf")).amax(dim=1)
    elsewhere = (ids_N < 0) | (ids_N >= columns)
    target = F.pad(real, (0, 1)).gather(1, ids_N.masked_fill(elsewhere, columns).unsqueeze(1)).squeeze(1)
    return largest, (real - largest.unsqueeze(1)).exp().sum(dim=1), target


def softmax_statistics(logits_NV: Tensor, ids_N: Tensor, columns: int) -> SoftmaxStatistics:
    """`softmax_statistics_` as a record."""
    return SoftmaxStatistics(*softmax_statistics_(logits_NV, ids_N, columns))


@operation
def softmax_gradient_(
    logits_NV: Tensor, own_logsumexp_N: Tensor, ids_N: Tensor, logsumexp_N: Tensor, grad_N: Tensor, columns: int
) -> None:
    """Overwrites what `softmax_statistics_` left with (softmax - one_hot(target)) * grad, and padding columns with 0.

    `own_logsumexp_N` is that of these columns, `logsumexp_N` that of all, in other blocks and on other ranks too.
    """
    numbers = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    one_hot = (ids_N.unsqueeze(1) == numbers).to(logsumexp_N.dtype)
    gradient = ((logits_NV.to(logsumexp_N.dtype) - logsumexp_N.unsqueeze(1)).exp() - one_hot) * grad_N.unsqueeze(1)
    logits_NV.copy_(gradient.masked_fill_(numbers >= columns, 0))


@operation
def vocabulary_blocks(weight_VH: Tensor, tokens: int) -> list[slice]:
    """Rows of the output layer's weight whose logits, of so many tokens, are best made at once."""
    return [slice(0, weight_VH.shape[0])]
