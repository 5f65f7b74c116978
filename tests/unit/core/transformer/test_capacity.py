"""Experts over their capacity drop the right tokens, wherever those are."""

import math
from dataclasses import replace

import pytest
import torch
from model_testing import TINY_MODEL, layer_specs
from torch import Tensor

from megatron.core.fusions.capacity import within_capacity
from megatron.core.fusions.permute import combine_rows, gather_probs, gather_rows, pad_rows, permutation_map
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import Placement, specs_of
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

PLACEMENT = Placement(dtype=torch.float64, device=torch.device("cpu"))

EXPERTS, LENGTH, BATCH = TINY_MODEL.num_experts, 11, 2


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize("by_priority", [False, True])
def test_an_expert_keeps_its_first_pairs(capacity: int, by_priority: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(13, 5, generator=generator).topk(2).indices
    priority = torch.randint(0, 4, (13, 2), generator=generator).double()  # many equal ones
    kept = within_capacity(experts, 5, capacity, priority if by_priority else None)
    for expert in range(5):
        pairs = [(token, choice) for token in range(13) for choice in range(2) if experts[token, choice] == expert]
        if by_priority:
            pairs.sort(key=lambda pair: -priority[pair].item())
        assert {pair for pair in pairs if kept[pair]} == set(pairs[:capacity])


def _router(policy: str, factor: float) -> tuple[TopKRouter, Tensor]:
    config = replace(TINY_MODEL, moe_expert_capacity_factor=factor, moe_token_drop_policy=policy)  # type: ignore[arg-type]
    router = TopKRouter(config, 0, layer_specs(config)["mlp.router.weight"], Group(), PLACEMENT)
    generator = torch.Generator().manual_seed(4)
    torch.nn.init.normal_(router.weight, generator=generator)
    return router, torch.randn(LENGTH, BATCH, TINY_MODEL.hidden_size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_the_router_drops_over_the_whole_microbatch_in_the_order_of_positions(policy: str) -> None:
    router, x = _router(policy, 0.6)
    shuffled = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(5))
    free = replace(TINY_MODEL, moe_expert_capacity_factor=None)
    dropless = TopKRouter(free, 0, layer_specs(free)["mlp.router.weight"], Group(), PLACEMENT)
    dropless.load_state_dict(router.state_dict())
    whole, statistics = dropless(x, Microbatch())
    routing, statistics_with_drops = router(x[shuffled], Microbatch(places=shuffled))
    capacity = math.ceil(0.6 * LENGTH * BATCH * 2 / EXPERTS)
    assert routing.capacity == capacity
    torch.testing.assert_close(statistics.tokens_per_expert, statistics_with_drops.tokens_per_expert)

    expected = whole.experts_TK.clone()
    for expert in range(EXPERTS):
        pairs = (whole.experts_TK == expert).nonzero().tolist()
        if policy == "probs":
            pairs.sort(key=lambda pair: -whole.probs_TK[pair[0], pair[1]].item())
        for token, choice in pairs[capacity:]:
            expected[token, choice] = EXPERTS
    assert (expected == EXPERTS).any()
    assert torch.equal(routing.experts_TK.unflatten(0, (-1, BATCH)), expected.unflatten(0, (-1, BATCH))[shuffled])
    kept = [int((expected == expert).sum()) for expert in range(EXPERTS)]
    assert routing.tokens_per_expert_E.tolist() == kept and max(kept) == capacity


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0, 0), (0, 5, 1)], ids=str)
def test_padding_adds_zero_rows_and_changes_nothing_else(counts: tuple[int, ...]) -> None:
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)] + [torch.full((2,), 3)])
    experts = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(6))].view(-1, 2)
    plain = permutation_map(experts, 3, sum(counts))
    padded = pad_rows(permutation_map(experts, 3), experts, 5)
    assert padded.offsets_E.tolist() == [5, 10, 15] and padded.row_to_pair_R.shape == (15,)
    x = torch.randn(experts.shape[0], 4, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True)
    for expert, (start, end) in enumerate(zip([0, *plain.offsets_E.tolist()], plain.offsets_E.tolist(), strict=False)):
        for gather, values in ((gather_rows, x), (gather_probs, probs)):
            ours, theirs = gather(values, padded), gather(values, plain)
            assert torch.equal(ours[5 * expert : 5 * expert + end - start], theirs[start:end])
            assert not ours[5 * expert + end - start : 5 * expert + 5].any()
    assert torch.equal(combine_rows(gather_rows(x, padded), padded), combine_rows(gather_rows(x, plain), plain))
    assert torch.autograd.gradcheck(lambda x: combine_rows(gather_rows(x, padded), padded), x)
    assert torch.autograd.gradcheck(lambda probs: gather_probs(probs, padded), probs)


def _layer(**settings: object) -> MoELayer:
    config = replace(TINY_MODEL, **settings)  # type: ignore[arg-type]
    layer = MoELayer(config, 0, specs_of("mlp", layer_specs(config)), ProcessGroups(), PLACEMENT)
    for number, parameter in enumerate(layer.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return layer


def test_a_large_capacity_changes_nothing_and_padding_never_does() -> None:
    x = torch.randn(LENGTH, BATCH, TINY_MODEL.hidden_size, dtype=torch.float64)
    microbatch = Microbatch(places=torch.arange(LENGTH))
    dropless, roomy = (
        _layer()(x, microbatch)[0],
        _layer(moe_expert_capacity_factor=float(EXPERTS))(x, microbatch)[0],
    )
    torch.testing.assert_close(dropless, roomy, rtol=1e-12, atol=1e-14)
    tight = _layer(moe_expert_capacity_factor=0.5)(x, microbatch)[0]
    padded = _layer(moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=True)(x, microbatch)[0]
    torch.testing.assert_close(tight, padded, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(dropless, tight)
