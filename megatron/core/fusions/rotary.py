"""Rotary position embedding (RoFormer, arXiv:2104.09864), in the form that rotates the two halves of a head."""

import torch
from torch import Tensor


def rotary_tables(
    length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * base^(-2i/head_dim), each [length, head_dim/2], in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=device) / head_dim
    angles = torch.outer(torch.arange(length, dtype=wide, device=device), 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+d/2}) by its position's angle: x [..., S, d], tables [S, d/2] -> [..., S, d]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
