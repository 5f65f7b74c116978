"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the form that rotates the two halves of a head."""

import torch
from torch import Tensor


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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+d/2}) by its position's angle: x [B, heads, S, d] -> the same shape."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
