"""The auxiliary losses are the formulas of the papers, and their gradient reaches the router."""

import pytest
import torch
from model_testing import TINY_MODEL

from megatron.core.parallel_state import Group
from megatron.core.transformer.moe.router import TopKRouter


def test_losses_and_gradients_equal_the_formulas() -> None:
    router = TopKRouter(TINY_MODEL, token_group=Group(), sequence_parallel=False, device=torch.device("cpu"))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(37, TINY_MODEL.hidden_size, dtype=torch.float64)
    routing, statistics = router(x, 0.25)
    (routing.probs_TK * 0).sum().backward()
    gradient = router.weight.grad
    router.weight.grad = None

    logits = x @ router.weight.T
    probs = logits.softmax(-1)
    counts = torch.zeros(4, dtype=torch.float64)
    for expert in logits.topk(2).indices.reshape(-1).tolist():
        counts[expert] += 1
    balance = 4 / (2 * 37**2) * sum(counts[e] * probs[:, e].sum() for e in range(4))
    z_loss = logits.logsumexp(-1).square().mean()
    assert isinstance(balance, torch.Tensor)
    assert statistics.load_balancing_loss.item() == pytest.approx(balance.item(), rel=1e-12)
    assert statistics.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-12)
    assert torch.equal(statistics.tokens_per_expert, counts)
    (0.25 * (0.1 * balance + 0.01 * z_loss)).backward()
    torch.testing.assert_close(gradient, router.weight.grad, rtol=1e-10, atol=1e-14)


def test_a_balanced_router_has_loss_one() -> None:
    router = TopKRouter(TINY_MODEL, token_group=Group(), sequence_parallel=False, device=torch.device("cpu"))
    torch.nn.init.zeros_(router.weight)
    _, statistics = router(torch.randn(64, TINY_MODEL.hidden_size, dtype=torch.float64), 1.0)
    assert statistics.load_balancing_loss.item() == pytest.approx(1.0, rel=1e-12)
