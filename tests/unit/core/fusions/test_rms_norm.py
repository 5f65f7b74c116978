"""RMSNorm and rotary embedding against their definitions, forward and backward."""

import math

import pytest
import torch
from closeness import BOUNDS, relative_error

from megatron.core.fusions.rms_norm import rms_norm
from megatron.core.fusions.rotary import apply_rotary, rotary_tables


def test_rms_norm_is_its_definition_and_differentiates() -> None:
    x = torch.randn(3, 2, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-5), (x, weight))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, BOUNDS[torch.bfloat16])])
def test_rms_norm_in_low_precision(dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(64, 256, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(256, dtype=torch.float64).to(dtype).requires_grad_()
    wide_x, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    grad = torch.randn(64, 256, dtype=torch.float64).to(dtype)
    y, expected = rms_norm(x, weight, 1e-5), rms_norm(wide_x, wide_weight, 1e-5)
    y.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in ((y, expected), (x.grad, wide_x.grad), (weight.grad, wide_weight.grad)):
        assert ours is not None and theirs is not None and ours.dtype == dtype
        assert relative_error(ours, theirs) <= bound


def test_rotary_turns_each_pair_by_its_angle() -> None:
    length, width, base = 5, 6, 100.0
    x = torch.randn(length, width, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(length), width, base, torch.float64)
    rotated = apply_rotary(x, cos, sin)
    for position in range(length):
        for pair in range(width // 2):
            angle = position * base ** (-2 * pair / width)
            value = complex(x[position, pair].item(), x[position, pair + width // 2].item())
            value *= complex(math.cos(angle), math.sin(angle))
            assert rotated[position, pair].item() == pytest.approx(value.real, rel=1e-12)
            assert rotated[position, pair + width // 2].item() == pytest.approx(value.imag, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, cos, sin), x)
