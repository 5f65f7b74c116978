"""Both dispatchers, on 2 and 4 ranks with forced routings, give what one process with all tokens gives."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from closeness import relative_error
from distributed_testing import run_distributed
from model_testing import TINY_MODEL, layer_specs
from torch import Tensor, nn

from megatron.core.config import ParallelConfig
from megatron.core.fusions.router import Routing
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.tensor_parallel.mappings import all_reduce
from megatron.core.tensor_parallel.parameter import NamedShard, Placement, initialize_parameters, named_shards, specs_of
from megatron.core.tensor_parallel.partition import slice_for_rank
from megatron.core.transformer.moe.experts import Experts
from megatron.core.transformer.moe.token_dispatcher import (
    AllGatherTokenDispatcher,
    AllToAllTokenDispatcher,
    LocalTokenDispatcher,
    TokenDispatcher,
)

EXPERTS, HIDDEN = TINY_MODEL.num_experts, TINY_MODEL.hidden_size


class Case(NamedTuple):
    """Tokens of up to four ranks, and the experts each token may be sent to."""

    tokens: tuple[int, int, int, int]
    allowed: tuple[int, ...]
    top_k: int


CASES = {
    "prime numbers of tokens": Case((7, 11, 13, 17), (0, 1, 2, 3), 2),
    "all to one expert": Case((7, 3, 5, 2), (2,), 1),
    "one expert never chosen": Case((5, 5, 5, 5), (0, 1, 3), 2),
    "only the first rank's experts": Case((5, 2, 3, 7), (0,), 1),
    "a rank without tokens": Case((0, 13, 0, 3), (0, 1, 2, 3), 2),
    "no tokens at all": Case((0, 0, 0, 0), (0, 1, 2, 3), 2),
    "every expert": Case((3, 1, 2, 5), (0, 1, 2, 3), 4),
}


def _inputs(case: Case, ranks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens, probabilities, experts and output gradients of every rank."""
    generator = torch.Generator().manual_seed(5)
    counts = list(case.tokens[:ranks])
    total = sum(counts)
    x = torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)
    probs = torch.rand(total, case.top_k, generator=generator, dtype=torch.float64)
    order = torch.rand(total, len(case.allowed), generator=generator).argsort(dim=1)[:, : case.top_k]
    experts = torch.tensor(case.allowed)[order]
    grads = torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)
    return list(x.split(counts)), list(probs.split(counts)), list(experts.split(counts)), list(grads.split(counts))


def _experts(groups: ProcessGroups) -> tuple[Experts, nn.Module]:
    """The experts, and a module in which they have the names their initial values are drawn from."""
    placement = Placement(dtype=torch.float64, device=torch.device("cpu"))
    experts = Experts(TINY_MODEL, specs_of("mlp.experts", layer_specs(TINY_MODEL, groups)), placement)
    whole = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    initialize_parameters(whole, 0, 1)
    return experts, whole


def _outcome(
    dispatcher: TokenDispatcher, experts: Experts, x: Tensor, probs: Tensor, chosen: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of tokens and probabilities; those of the weights are left in `grad`."""
    x, probs = x.clone().requires_grad_(), probs.clone().requires_grad_()
    counts = (chosen.unsqueeze(-1) == torch.arange(EXPERTS)).sum(dim=(0, 1)).double()
    unused = torch.empty(0)
    dispatched = dispatcher.dispatch(x, Routing(probs, chosen, unused, unused, counts))
    y = dispatcher.combine(experts(dispatched.tokens_TH, dispatched.probs_TK, dispatched.index), dispatched)
    experts.zero_grad()
    y.backward(grad)
    assert x.grad is not None and probs.grad is not None
    return y.detach(), x.grad, probs.grad


def _gradients(module: nn.Module) -> list[NamedShard]:
    """The gradient of every parameter, cut and named as the parameter is."""
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
        shards = [replace(shard, data=shard.data.clone()) for shard in named_shards(module, 0)]
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return shards


def _differences(rank: int, world_size: int, ep: int, etp: int, kind: str, cases: list[str]) -> dict[str, float]:
    """Largest ||a-b||/||b|| of every case over the output and every gradient."""
    parallel = ParallelConfig(expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    groups = build_process_groups(parallel, rank, world_size)
    dispatcher: TokenDispatcher
    if kind == "alltoall":
        dispatcher = AllToAllTokenDispatcher(EXPERTS, ep=groups.ep, etp=groups.etp, ep_etp=groups.ep_etp)
    else:
        dispatcher = AllGatherTokenDispatcher(EXPERTS, ep=groups.ep, ep_etp=groups.ep_etp)
    (experts, named), (all_experts, all_named) = _experts(groups), _experts(ProcessGroups())
    found = {}
    for name in cases:
        case = CASES[name]
        inputs = _inputs(case, world_size)
        joined = [torch.cat(parts) for parts in inputs]
        counts = list(case.tokens[:world_size])
        reference = _outcome(LocalTokenDispatcher(EXPERTS, ProcessGroups().etp), all_experts, *joined)
        ours = _outcome(dispatcher, experts, *(parts[rank] for parts in inputs))
        errors = [relative_error(a, whole.split(counts)[rank]) for a, whole in zip(ours, reference, strict=True)]
        theirs = {shard.global_name: shard.data for shard in _gradients(all_named)}
        for shard in _gradients(named):
            dim, stride = shard.spec.partition_dim, shard.spec.partition_stride
            part = slice_for_rank(theirs[shard.global_name], dim, stride, groups.etp.rank, etp)
            errors.append(relative_error(all_reduce(shard.data, groups.edp), part))
        found[name] = max(errors)
    return found


@pytest.mark.parametrize("kind", ["alltoall", "allgather"])
@pytest.mark.parametrize(("world_size", "ep", "etp"), [(2, 2, 1), (4, 4, 1), (4, 2, 2), (4, 2, 1)])
def test_forced_routings_equal_one_process(world_size: int, ep: int, etp: int, kind: str) -> None:
    for found in run_distributed(_differences, world_size, ep, etp, kind, list(CASES)):
        assert {name: error for name, error in found.items() if not error <= 1e-10} == {}


def test_ranks_that_split_every_expert_equal_one_process() -> None:
    # they take the number of tokens to be the same everywhere
    cases = ["one expert never chosen", "no tokens at all"]
    for found in run_distributed(_differences, 2, 1, 2, "allgather", cases):
        assert max(found.values()) <= 1e-10
