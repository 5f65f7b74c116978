"""Rotation of queries and keys, read through any strides and written contiguously."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, length, half, sign,
    x_batch, x_head, x_position, table_batch, table_position, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, HALF)[None, :]
    table = batch * table_batch + position * table_position + column
    cos = tl.load(cos_ptr + table, mask=column < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + table, mask=column < half, other=0.0).to(tl.float32) * sign
    for start in range(0, heads, HEADS):
        head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        inside = (head < heads) & (column < half)
        source = x_ptr + batch * x_batch + head * x_head + position * x_position + column
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + ((batch * heads + head) * length + position) * 2 * half + column
        tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotates each pair (x_i, x_{i+d/2}) by its position's angle, or back: [B, heads, S, d] -> the same, contiguous.

    `cos` and `sin` are [S, d/2], or [B, S, d/2] where positions differ between the sequences of a batch. The last axis
    of all inputs has stride 1.
    """
    batch, heads, length, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    table_batch = cos.stride(0) if cos.dim() == 3 else 0
    if out.numel():
        _rotate[(length, batch)](
            x, cos, sin, out, heads, length, width // 2, -1.0 if inverse else 1.0,
            x.stride(0), x.stride(1), x.stride(2), table_batch, cos.stride(-2),
            HEADS=min(8, triton.next_power_of_2(heads)), HALF=triton.next_power_of_2(width // 2),
        )  # fmt: skip
    return out
