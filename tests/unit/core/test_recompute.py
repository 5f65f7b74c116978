"""Activations computed again: the same bits, fewer bytes kept, nothing counted twice; and what the flags refuse."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_testing import TINY_MODEL
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.fusions.kernels import instruction_set
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups
from megatron.core.recompute import RecomputeConfig, without_keeping
from megatron.core.tensor_parallel.parameter import initialize_parameters
from megatron.core.transformer.moe.router import TopKRouter

SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full"}
CASES = {
    "core_attn": SELECTIVE,
    "moe_act": SELECTIVE | {"recompute_modules": ("moe_act",)},
    "layernorm": SELECTIVE | {"recompute_modules": ("layernorm",)},
    "moe": SELECTIVE | {"recompute_modules": ("moe",)},
    "moe_layer_recompute": {"moe_layer_recompute": True},
    "moe_layer_recompute, layernorm": {"moe_layer_recompute": True, "recompute_modules": ("layernorm",)},
    "core_attn, moe_act, layernorm": SELECTIVE | {"recompute_modules": ("core_attn", "moe_act", "layernorm")},
    "core_attn, moe, layernorm": SELECTIVE | {"recompute_modules": ("core_attn", "moe", "layernorm")},
    "uniform 1": FULL,
    "uniform 3": FULL | {"recompute_method": "uniform", "recompute_num_layers": 3},
    "block 2": FULL | {"recompute_method": "block", "recompute_num_layers": 2},
}
BATCH, SEQUENCE, LAYERS = 2, 16, 4


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation returns, without keeping any alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, model: nn.Module) -> int:
        """Bytes of those that still exist and are not the model's."""
        gc.collect()
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        alive = {key: size for key, (reference, size) in self.seen.items() if not reference.expired()}
        return sum(size for key, size in alive.items() if key not in weights)


def build(recompute: RecomputeConfig, dtype: str, layers: int = LAYERS) -> MixtralModel:
    config = replace(TINY_MODEL, params_dtype=dtype, num_layers=layers)
    device = torch.device("cpu")
    model = MixtralModel(config, groups=ProcessGroups(), sequence_parallel=False, device=device, recompute=recompute)
    initialize_parameters(model, 0, 3)
    return model


def text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 203, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def kept_bytes(recompute: RecomputeConfig, dtype: str, layers: int = LAYERS) -> int:
    """What is alive after the forward pass that was not before."""
    model, (tokens, labels) = build(recompute, dtype, layers), text()
    with LiveStorages() as live:
        output = model(tokens, Microbatch(labels=labels, factors=GradientFactors(num_microbatches=2)))
    assert output.tensor.requires_grad
    return live.alive(model)


def step(recompute: RecomputeConfig, dtype: str) -> tuple[list[Tensor], int]:
    """Loss, statistics and gradients of one microbatch, and how often a router ran."""
    model, (tokens, labels) = build(recompute, dtype), text()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(count)
    loss, statistics = model(tokens, Microbatch(labels=labels, factors=GradientFactors(num_microbatches=2)))
    loss.mean().backward()
    return [loss.detach(), *statistics, *(parameter.grad for parameter in model.parameters())], calls


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_is_the_same(case: str, dtype: str) -> None:
    expected, _ = step(RecomputeConfig(), dtype)
    actual, routings = step(RecomputeConfig(**CASES[case]), dtype)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    again = {"moe_layer_recompute": 4, "moe_layer_recompute, layernorm": 4}
    again |= {"moe": 4, "core_attn, moe, layernorm": 4, "uniform 1": 4, "uniform 3": 4, "block 2": 2}
    assert routings == 4 + again.get(case, 0)


def test_selective_recomputation_gives_up_exactly_what_it_covers() -> None:
    """In float32: what each module no longer keeps, in elements a layer."""
    model = TINY_MODEL
    tokens = BATCH * SEQUENCE
    queries, keys = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    # rotated queries and keys, the log-sum-exp of each row, and the result where the next product takes a copy of it
    result = 0 if instruction_set() in ("amx", "avx512") else queries
    core_attn = tokens * (queries + keys + result + model.num_attention_heads)
    expected = {"core_attn": core_attn, "moe_act": 0, "layernorm": 2 * tokens * 32}
    places = 8 * SEQUENCE  # a part of the record that attention is given again
    whole = kept_bytes(RecomputeConfig(), "float32")
    for module, elements in expected.items():
        saved = whole - kept_bytes(RecomputeConfig(**SELECTIVE, recompute_modules=(module,)), "float32")
        assert saved == 4 * LAYERS * elements - (places if module == "core_attn" else 0), module
    narrow = kept_bytes(RecomputeConfig(), "bfloat16")
    saved = narrow - kept_bytes(RecomputeConfig(**SELECTIVE, recompute_modules=("layernorm",)), "bfloat16")
    assert saved == 2 * LAYERS * expected["layernorm"], "something keeps a wide copy of what norms return"
    together = kept_bytes(RecomputeConfig(**SELECTIVE, recompute_modules=tuple(expected)), "float32")
    assert whole - together == 4 * LAYERS * sum(expected.values()) - places


@pytest.mark.parametrize(("case", "inputs"), [("uniform 1", 6), ("uniform 3", 2)])
def test_full_recomputation_keeps_one_input_a_unit(case: str, inputs: int) -> None:
    """Six more layers cost their units' inputs and a few bytes of statistics."""
    config = RecomputeConfig(**CASES[case])
    more = kept_bytes(config, "float32", 9) - kept_bytes(config, "float32", 3)
    statistics = more - inputs * 4 * BATCH * SEQUENCE * TINY_MODEL.hidden_size
    assert 0 <= statistics <= 6 * 64


def test_what_is_not_kept_is_computed_once_for_all_its_uses() -> None:
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * 2

    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    y = double(x)
    with without_keeping(y, double, x):
        total = sum(F.linear(y.view(3, 4), weight).sum() for weight in weights)
    del y
    assert isinstance(total, Tensor)
    total.backward()
    assert calls == 2
    torch.testing.assert_close(weights[0].grad, (2 * x.detach()).sum(0).expand(5, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SELECTIVE | {"recompute_modules": ("mlp",)}, "every layer of a Mixtral has experts"),
        (SELECTIVE | {"recompute_modules": ("core_atn",)}, "core_atn is unknown: choose from core_attn"),
        (SELECTIVE | {"recompute_modules": ("moe", "moe_act")}, "contains moe_act"),
        ({"moe_layer_recompute": True, "recompute_modules": ("moe_act",)}, "contains moe_act"),
        (FULL | {"moe_layer_recompute": True}, "--moe-layer-recompute is selective and contradicts"),
        ({"recompute_modules": ("moe",)}, "needs --recompute-granularity selective"),
        (FULL | {"recompute_modules": ("moe",)}, "needs --recompute-granularity selective"),
        (FULL | {"recompute_activations": True}, "contradicts"),
        (SELECTIVE | {"recompute_method": "block"}, "need --recompute-granularity full"),
        ({"recompute_num_layers": 2}, "need --recompute-granularity full"),
        (FULL | {"recompute_num_layers": 0}, "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecomputeConfig(**settings)


def test_the_short_flag_covers_the_experts_and_what_else_is_asked_for() -> None:
    def covered(**settings: Any) -> set[str]:
        config = RecomputeConfig(**settings)
        return {name for name in ("core_attn", "moe_act", "layernorm", "moe") if config.includes(name)}

    assert covered(moe_layer_recompute=True) == {"moe"}
    assert covered(moe_layer_recompute=True, **SELECTIVE) == {"moe", "core_attn"}
    assert covered(moe_layer_recompute=True, recompute_modules=("layernorm",)) == {"moe", "layernorm"}
    assert covered(recompute_activations=True) == {"core_attn"}
    assert covered() == set()


def test_layers_of_a_stage_are_divided_into_units() -> None:
    def units(**settings: Any) -> list[tuple[list[int], bool]]:
        return [(list(layers), again) for layers, again in RecomputeConfig(**settings).units(5)]

    assert units() == units(**SELECTIVE) == [([0, 1, 2, 3, 4], False)]
    assert units(**CASES["uniform 3"]) == [([0, 1, 2], True), ([3, 4], True)]
    assert units(**CASES["block 2"]) == [([0], True), ([1], True), ([2, 3, 4], False)]
    assert units(**FULL, recompute_method="block", recompute_num_layers=9) == [([n], True) for n in range(5)]
