"""How close a tensor is to another, and how close a type allows it to be."""

import torch
from torch import Tensor

BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""Relative error of one operation that sums in float32 or wider."""


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference||, in float64; of a reference of zeros, anything else is far away."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))
