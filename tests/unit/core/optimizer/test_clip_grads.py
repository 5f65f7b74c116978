"""The norm is precise for buffers of any length, and not finite when it should not be."""

import math

import pytest
import torch

from megatron.core.optimizer.clip_grads import gradient_norm
from megatron.core.parallel_state import Group


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-5)])
def test_long_buffers(dtype: torch.dtype, bound: float) -> None:
    # one running float32 sum of so many squares is off by 3e-4
    grads = torch.randn(9_000_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = grads.double().norm().item()
    assert gradient_norm([grads[:100], grads[100:]], torch.zeros(()), Group()) == pytest.approx(expected, rel=bound)


def test_a_bad_loss_is_a_bad_norm() -> None:
    grads = [torch.ones(4)]
    assert gradient_norm(grads, torch.tensor(7.0), Group()) == 2
    assert not math.isfinite(gradient_norm(grads, torch.tensor(math.inf), Group()))
    assert not math.isfinite(gradient_norm(grads, torch.tensor(math.nan), Group()))
