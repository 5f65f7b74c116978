"""The keys of Megatron-LM's `torch_dist` format for the weights of a Mixtral, and their leading axes.

One key holds a weight of all layers, and of all experts, along leading axes: `decoder.layers.mlp.router.weight` is
[layers, experts, hidden], `decoder.layers.mlp.experts.experts.linear_fc1.weight` [layers, experts, 2 ffn, hidden].
Where layers differ, Megatron-LM writes `decoder.layers.3.mlp.router.weight` instead. TransformerEngine's layers hold
the norm before them; Megatron-LM's own (`--transformer-impl local`) save all norms under the names of such layers.
"""

import re
from typing import NamedTuple

from megatron.core.models.weight_table import WeightRule

IMPLEMENTATIONS = ("transformer_engine", "local")
# For each of ours, theirs with each implementation, and last the plain one.
_NORMS = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight",) * 2 + ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
}
# Modules with state of their own beside weights, which is empty without FP8 but has to be there.
_STATES = {
    "transformer_engine": (
        "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention", "pre_mlp_layernorm",
    ),
    "local": ("self_attention.linear_qkv", "self_attention.linear_proj"),
}  # fmt: skip


class Key(NamedTuple):
    """Where a weight is: a key, and its indices along the leading axes."""

    name: str
    at: tuple[int, ...] = ()


def keys_of(rule: WeightRule) -> list[Key]:
    """Every key that may hold a weight: with all layers first, and as written by `IMPLEMENTATIONS` in their order."""
    if rule.layer is None:
        return [Key(rule.name)]
    name = rule.name.removeprefix(f"decoder.layers.{rule.layer}.")
    name = re.sub(r"^mlp\.experts\.local_experts\.[0-9]+\.", "mlp.experts.experts.", name)
    expert = () if rule.expert is None else (rule.expert,)
    names = _NORMS.get(name, (name,))
    together = [Key(f"decoder.layers.{each}", (rule.layer, *expert)) for each in names]
    return together + [Key(f"decoder.layers.{rule.layer}.{each}", expert) for each in names]


def key_of(rule: WeightRule, implementation: str) -> Key:
    """The key that a model of an implementation reads a weight from."""
    keys = keys_of(rule)
    together = keys[: max(len(keys) // 2, 1)]
    number = IMPLEMENTATIONS.index(implementation)
    return together[number if number < len(together) else 0]


def state_keys(layers: int, experts: int, implementation: str) -> list[str]:
    """Keys of the objects that a model of an implementation asks for beside its weights."""
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
        for module in _STATES[implementation]
        for layer in range(layers)
    ]
    keys += [
        f"decoder.layers.mlp.experts.experts.{module}._extra_state/shard_{layer}.{expert}_{layers}.{experts}"
        for module in ("linear_fc1", "linear_fc2")
        for layer in range(layers)
        for expert in range(experts)
    ]
    return keys + (["decoder.final_layernorm._extra_state/shard_0_1"] if implementation == "transformer_engine" else [])
