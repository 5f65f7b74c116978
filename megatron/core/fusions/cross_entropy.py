"""Softmax statistics of logits, and their gradient in place: no second tensor of their size is made.

N tokens, V columns of the vocabulary on this rank, of which the first `columns` are real and the rest padding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.core.fusions import backend

# Rows are worked on in blocks of about this many logits, whose wide copies then stay in the processor's cache.
BLOCK_ELEMENTS = 2**20


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits_NV.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits_NV.shape[0], rows))


def softmax_statistics(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest), and the target's logit or 0 if it is not here: [N] each.

    float32, or float64 for float64 logits. `ids_N` (int64) count from this rank's first column. Without any real
    column the largest is -inf and the sum 0.
    """
    if backend.runs_triton(logits_NV):
        from megatron.core.fusions.kernels import cross_entropy as kernels

        return kernels.statistics(logits_NV, ids_N, columns)
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    count = logits_NV.shape[0]
    largest = torch.full((count,), float("-inf"), dtype=wide, device=logits_NV.device)
    total, target = torch.zeros_like(largest), torch.zeros_like(largest)
    if columns:
        for rows in _blocks(logits_NV):
            real = logits_NV[rows, :columns].to(wide)
            torch.amax(real, dim=1, out=largest[rows])
            torch.sum((real - largest[rows].unsqueeze(1)).exp_(), dim=1, out=total[rows])
        elsewhere = (ids_N < 0) | (ids_N >= columns)
        found = logits_NV.gather(1, ids_N.masked_fill(elsewhere, 0).unsqueeze(1)).squeeze(1)
        target = found.to(wide).masked_fill_(elsewhere, 0)
    return largest, total, target


def softmax_gradient_(logits_NV: Tensor, ids_N: Tensor, logsumexp_N: Tensor, grad_N: Tensor, columns: int) -> None:
    """Overwrites the logits with (softmax - one_hot(target)) * grad, and with 0 in padding columns."""
    if backend.runs_triton(logits_NV):
        from megatron.core.fusions.kernels import cross_entropy as kernels

        kernels.gradient_(logits_NV, ids_N, logsumexp_N, grad_N, columns)
        return
    logits_NV[:, columns:] = 0
    if not columns:
        return
    wide = logsumexp_N.dtype
    elsewhere = (ids_N < 0) | (ids_N >= columns)
    ids, one = ids_N.masked_fill(elsewhere, 0).unsqueeze(1), (~elsewhere).to(wide).neg_().unsqueeze(1)
    for rows in _blocks(logits_NV):
        real = logits_NV[rows, :columns]
        softmax = real.to(wide).sub_(logsumexp_N[rows].unsqueeze(1)).exp_()  # in place where the types are equal
        softmax.scatter_add_(1, ids[rows], one[rows]).mul_(grad_N[rows].unsqueeze(1))
        if softmax.data_ptr() != real.data_ptr():
            real.copy_(softmax)
