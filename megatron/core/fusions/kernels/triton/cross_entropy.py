"""Softmax statistics of rows of logits in one pass, and their gradient in place, in float32.

N tokens, V columns of the vocabulary on this rank, of which the first `columns` are real and the rest padding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _statistics(
    logits_ptr, ids_ptr, max_ptr, sum_ptr, target_ptr, width, columns, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        x = tl.load(logits_ptr + row * width + column, mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        # lanes that have seen nothing yet would subtract infinities
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = new
    row_max = tl.max(largest, axis=0)
    safe = tl.where(row_max == float("-inf"), 0.0, row_max)
    tl.store(max_ptr + row, row_max)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(largest - safe), axis=0))
    target = tl.load(ids_ptr + row)
    here = (target >= 0) & (target < columns)
    logit = tl.load(logits_ptr + row * width + target, mask=here, other=0.0).to(tl.float32)
    tl.store(target_ptr + row, logit)


@triton.jit
def _gradient(logits_ptr, ids_ptr, logsumexp_ptr, grad_ptr, width, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + row * width + column
    x = tl.load(place, mask=column < columns, other=float("-inf")).to(tl.float32)
    softmax = tl.exp(x - tl.load(logsumexp_ptr + row))
    one_hot = tl.where(column == tl.load(ids_ptr + row), 1.0, 0.0)
    grad = tl.where(column < columns, (softmax - one_hot) * tl.load(grad_ptr + row), 0.0)
    tl.store(place, grad.to(logits_ptr.dtype.element_ty), mask=column < width)


def softmax_statistics_(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of exp(logit - largest) and the target's logit, float32 [N] each."""
    rows, width = logits_NV.shape
    largest, total, target = (torch.empty(rows, dtype=torch.float32, device=logits_NV.device) for _ in range(3))
    if rows:
        _statistics[(rows,)](logits_NV, ids_N, largest, total, target, width, columns, BLOCK=BLOCK)
    return largest, total, target


def softmax_gradient_(
    logits_NV: Tensor, own_logsumexp_N: Tensor, ids_N: Tensor, logsumexp_N: Tensor, grad_N: Tensor, columns: int
) -> None:
    """Overwrites the logits with (softmax - one_hot(target)) * grad, and with 0 in padding columns."""
    rows, width = logits_NV.shape
    if rows:
        _gradient[(rows, triton.cdiv(width, BLOCK))](logits_NV, ids_N, logsumexp_N, grad_N, width, columns, BLOCK=BLOCK)
