"""Types, bounds and comparisons of the kernel tests."""

import pytest
import torch
from torch import Tensor

# The interpreter computes bfloat16 wrongly without saying so: that type is for a GPU alone.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
BOUNDS = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers that `dtype` can hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def assert_close(ours: Tensor, reference: Tensor | None) -> None:
    """||ours - reference|| / ||reference|| within the bound of ours' type."""
    assert reference is not None
    ours, reference = ours.detach(), reference.detach()
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    if reference.numel() and reference.norm() > 0:
        error = float((ours.double() - reference.double()).norm() / reference.double().norm())
        assert error <= BOUNDS[ours.dtype], error
    else:
        assert not ours.any()
