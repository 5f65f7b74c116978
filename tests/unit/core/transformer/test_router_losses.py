"""The auxiliary losses are the formulas of the papers, and their gradient reaches the router."""

from dataclasses import replace

import pytest
import torch
from model_testing import TINY_MODEL, layer_specs
from torch import Tensor

from megatron.core.config import ModelConfig
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.parameter import Placement
from megatron.core.transformer.moe.router import TopKRouter

EXPERTS, LENGTH, BATCH = TINY_MODEL.num_experts, 37, 3


def _router(config: ModelConfig) -> TopKRouter:
    placement = Placement(dtype=torch.float64, device=torch.device("cpu"))
    router = TopKRouter(config, 0, layer_specs(config)["mlp.router.weight"], Group(), placement)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(1))
    return router


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(LENGTH, BATCH, TINY_MODEL.hidden_size, dtype=torch.float64, generator=generator)


def _counts(logits: Tensor) -> Tensor:
    counts = torch.zeros(EXPERTS, dtype=torch.float64)
    for expert in logits.topk(2).indices.reshape(-1).tolist():
        counts[expert] += 1
    return counts


def _by_hand(kind: str, logits: Tensor, share: Tensor | None) -> Tensor:
    if kind == "seq_aux_loss":
        return torch.stack([_by_hand("aux_loss", logits[:, b : b + 1], None) for b in range(BATCH)]).mean()
    probs, tokens = logits.softmax(-1).flatten(0, 1), logits.shape[0] * logits.shape[1]
    if kind == "global_aux_loss":
        share = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64) if share is None else share
        return EXPERTS / tokens * sum(share[e] * probs[:, e].sum() for e in range(EXPERTS))  # type: ignore[return-value]
    counts = _counts(logits)
    return EXPERTS / (2 * tokens**2) * sum(counts[e] * probs[:, e].sum() for e in range(EXPERTS))  # type: ignore[return-value]


@pytest.mark.parametrize("share", [None, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_losses_and_gradients_equal_the_formulas(kind: str, share: Tensor | None) -> None:
    router, x = _router(replace(TINY_MODEL, moe_router_load_balancing_type=kind)), _tokens()  # type: ignore[arg-type]
    router.expert_share = share
    routing, statistics = router(x, Microbatch(factors=GradientFactors(num_microbatches=4)))
    (routing.probs_TK * 0).sum().backward()
    gradient = router.weight.grad
    router.weight.grad = None

    logits = x @ router.weight.T
    balance = _by_hand(kind, logits, share)
    z_loss = logits.logsumexp(-1).square().mean()
    assert statistics.load_balancing_loss.item() == pytest.approx(balance.item(), rel=1e-12)
    assert statistics.z_loss.item() == pytest.approx(z_loss.item(), rel=1e-12)
    assert torch.equal(statistics.tokens_per_expert, _counts(logits))
    (0.25 * (0.1 * balance + 0.01 * z_loss)).backward()
    torch.testing.assert_close(gradient, router.weight.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss", "none"])
def test_a_balanced_router_has_loss_one(kind: str) -> None:
    router = _router(replace(TINY_MODEL, moe_router_load_balancing_type=kind))  # type: ignore[arg-type]
    torch.nn.init.zeros_(router.weight)
    _, statistics = router(_tokens(), Microbatch())
    assert statistics.load_balancing_loss.item() == pytest.approx(1.0, rel=1e-12)


def test_without_balancing_only_the_z_loss_has_a_gradient() -> None:
    config = replace(TINY_MODEL, moe_router_load_balancing_type="none", moe_z_loss_coeff=0.0)
    router = _router(config)
    routing, _ = router(_tokens(), Microbatch())
    (routing.probs_TK * 0).sum().backward()
    assert router.weight.grad is not None and not router.weight.grad.any()
