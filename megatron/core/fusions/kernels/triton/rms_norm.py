"""Root-mean-square normalisation, one row a program; sums in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""Of the backward pass, at most: some four a multiprocessor of a large GPU, and the same bits on any of them."""


def _block(width: int) -> dict[str, int]:
    """A row in the registers of one program, at most 16 elements a thread where that many warps are allowed."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, inverse_rms_ptr, width, epsilon, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, axis=0) / width + epsilon)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normalized = (wide * inverse_rms).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (weight * normalized).to(x.dtype), mask=inside)
    tl.store(inverse_rms_ptr + row, inverse_rms)


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def _backward(
    grad_ptr, x_ptr, weight_ptr, inverse_rms_ptr, grad_x_ptr, partial_ptr, rows, rows_per_program, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    first = program * rows_per_program
    for step in range(tl.minimum(rows_per_program, rows - first)):
        row = first + step
        place = row * width + columns
        x = tl.load(x_ptr + place, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row)
        normalized = x.to(tl.float32) * inverse_rms
        grad_weight += grad * normalized
        grad = grad * weight
        mean = tl.sum(grad * normalized, axis=0) / width
        grad_x = (grad - normalized * mean) * inverse_rms
        tl.store(grad_x_ptr + place, grad_x.to(x.dtype), mask=inside)
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=inside)


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [..., H] contiguous -> y like x, and float32 1/rms [..., 1]."""
    width = x.shape[-1]
    y = torch.empty_like(x)
    inverse_rms = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = inverse_rms.numel()
    if rows:
        _forward[(rows,)](x, weight, y, inverse_rms, width, epsilon, **_block(width))
    return y, inverse_rms


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the weight in float32; all inputs contiguous."""
    width, rows = x.shape[-1], inverse_rms.numel()
    grad_x = torch.empty_like(x)
    rows_per_program = max(1, triton.cdiv(rows, PROGRAMS))
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    if rows:
        _backward[(programs,)](
            grad, x, weight, inverse_rms, grad_x, partial, rows, rows_per_program, width, **_block(width)
        )
    return grad_x, partial.sum(dim=0)
