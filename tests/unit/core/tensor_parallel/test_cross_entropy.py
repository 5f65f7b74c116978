"""Vocabulary-parallel cross entropy in one process; the layout tests cover the split one."""

import torch
import torch.nn.functional as F

from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy


def test_equals_torch_and_ignores_padding() -> None:
    logits = torch.randn(3, 5, 24, dtype=torch.float64) * 4
    logits[..., 20:] = 1e4  # padding that would win
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    targets = torch.randint(0, 20, (3, 5))
    weights = torch.rand(3, 5, dtype=torch.float64)
    loss = vocab_parallel_cross_entropy(ours, targets, 20, Group())
    expected = F.cross_entropy(theirs[..., :20].flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert ours.grad is not None and not ours.grad[..., 20:].any()


def test_bfloat16_logits_are_widened() -> None:
    logits = (torch.randn(64, 32) * 8).bfloat16()
    targets = torch.randint(0, 32, (64,))
    loss = vocab_parallel_cross_entropy(logits, targets, 32, Group())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets, reduction="none"), rtol=1e-5, atol=1e-5)
