"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the form that rotates the two halves of a head."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend
from megatron.core.fusions.native import kernels as native


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/head_dim), in float32 or wider.

    Positions [S] give tables [S, head_dim/2]; positions [B, S] of each sample give [B, 1, S, head_dim/2].
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim
    angles = positions.to(wide).unsqueeze(-1) * (1.0 / base**exponents)
    if positions.ndim == 2:
        angles = angles.unsqueeze(1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    if backend.runs_triton(x):
        from megatron.core.fusions.kernels import rotary as kernels

        return kernels.rotate(x, cos, sin, inverse=inverse)
    return native.rotate(x, cos, sin, inverse)


class _Rotate(Function):
    """A kernel; the gradient is rotated back, so that nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if cos.ndim == 4:
            cos, sin = cos.squeeze(1), sin.squeeze(1)
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, inverse=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0].contiguous(), *ctx.saved_tensors, inverse=True), None, None


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+d/2}) by its position's angle: x [B, heads, S, d] -> the same shape."""
    if backend.runs_triton(x, cos, sin) or (backend.runs_native(x) and cos.dtype == torch.float32):
        return _Rotate.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
