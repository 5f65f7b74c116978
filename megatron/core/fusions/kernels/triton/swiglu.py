"""SwiGLU times the routing probability: rows of [gate, up] to activations, computed in float32.

R rows, F width of one expert (on this rank).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ROWS, BLOCK_COLUMNS = 4, 512


@triton.jit(do_not_specialize=["rows"])
def _forward(gate_up_ptr, probs_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < width)
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    prob = tl.load(probs_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * prob
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr, gate_up_ptr, probs_ptr, grad_gate_up_ptr, y_ptr, grad_probs_ptr, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    prob = tl.load(probs_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    grad_prob = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = (row < rows) & (column < width)
        gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        grad_prob += grad * silu * up
        # d silu(g) / dg = s + g s (1 - s)
        grad_gate = grad * prob * up * (sigmoid + silu * (1 - sigmoid))
        grad_up = grad * prob * silu
        out = grad_gate_up_ptr + row * 2 * width + column
        tl.store(out, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(out + width, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + row * width + column, (silu * up * prob).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_probs_ptr + row, tl.sum(grad_prob, axis=1)[:, None], mask=row < rows)


def swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    """gate_up [R, 2F] contiguous, probs [R] -> silu(gate) * up * p, [R, F] in gate_up's type."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty((rows, width))
    if rows:
        grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(width, BLOCK_COLUMNS))
        _forward[grid](gate_up, probs, y, rows, width, ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS)
    return y


def swiglu_backward(grad: Tensor, gate_up: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From d(y) [R, F]: d(gate_up) [R, 2F], d(probs) [R], and y itself, which need not have been kept."""
    rows, width = grad.shape
    grad_gate_up, y = torch.empty_like(gate_up), torch.empty_like(grad)
    grad_probs = torch.empty_like(probs)
    if rows:
        _backward[(triton.cdiv(rows, BLOCK_ROWS),)](
            grad, gate_up, probs, grad_gate_up, y, grad_probs, rows, width, ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS
        )
    return grad_gate_up, grad_probs, y
