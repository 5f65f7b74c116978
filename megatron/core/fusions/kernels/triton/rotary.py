"""Rotation of queries and keys, read and written through strides.

The result lies in memory as [S, B, heads, d]. Attention's output follows its queries, and the product that comes after
attention then takes it as it is.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, half, sign, x_batch, x_head, x_position, out_batch, out_position,
    table_batch, table_position, HEADS: tl.constexpr, HALF: tl.constexpr,
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
        out = out_ptr + batch * out_batch + head * 2 * half + position * out_position + column
        tl.store(out, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + half, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """[B, heads, S, d] -> the same; the last axis of all inputs has stride 1."""
    batch, heads, length, width = x.shape
    out = x.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)
    table_batch = cos.stride(0) if cos.dim() == 3 else 0
    if out.numel():
        _rotate[(length, batch)](
            x, cos, sin, out, heads, width // 2, -1.0 if inverse else 1.0, *x.stride()[:3], out.stride(0),
            out.stride(2), table_batch, cos.stride(-2),
            HEADS=min(8, triton.next_power_of_2(heads)), HALF=triton.next_power_of_2(width // 2),
        )  # fmt: skip
    return out
