"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the form that rotates the two halves of a head."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions.forms import operation


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/head_dim), in float32 or wider.

    Positions [S], or [B, S] of each sample, give tables [..., S, head_dim/2].
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions.to(wide).unsqueeze(-1) * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


@operation
def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`apply_rotary`, or the rotation back; x may have any strides but the last, which is 1."""
    if cos.ndim == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if inverse:
        sin = -sin
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class _Rotate(Function):
    """The gradient is rotated back, so that nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return rotate(grad, cos, sin, True), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+d/2}) by its position's angle: x [B, heads, S, d] -> the same shape.

    The tables are [S, d/2], or [B, S, d/2] where positions differ between samples.
    """
    return _Rotate.apply(x, cos, sin)
