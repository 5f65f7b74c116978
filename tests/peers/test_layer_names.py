"""The names of norms that NVIDIA's layers save, as their source says: those of TransformerEngine need a GPU to run.

MEGATRON_CORE=/tmp/megatron-core python -m pytest -m peers tests/peers/test_layer_names.py
"""

import ast
import os
import re
from pathlib import Path

import pytest

from megatron.core.config import ModelConfig
from megatron.core.interchange.torch_dist.names import key_of
from megatron.core.models.mixtral.weights import mixtral_weights

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("MEGATRON_CORE" not in os.environ, reason="MEGATRON_CORE does not name a folder"),
]
NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")


def written_keys(implementation: str) -> dict[str, str]:
    """The key that we write each norm of a layer under, without `decoder.layers.`."""
    model = ModelConfig(
        num_layers=1, hidden_size=32, ffn_hidden_size=24, num_attention_heads=8, num_experts=2, vocab_size=100,
        max_position_embeddings=64,
    )  # fmt: skip
    rules = {rule.name.removeprefix("decoder.layers.0."): rule for rule in mixtral_weights(model)}
    return {name: key_of(rules[name], implementation).name.removeprefix("decoder.layers.") for name in NORMS}


def peer_source(file: str) -> str:
    """The text of a file of megatron-core."""
    return (Path(os.environ["MEGATRON_CORE"]) / "megatron" / "core" / file).read_text(encoding="utf-8")


def layer_arguments(kind: str) -> dict[str, ast.expr]:
    """What the layer of a GPT model with `linear_qkv` is made of, in the functions whose name contains `kind`."""
    found = [
        {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        for function in ast.walk(ast.parse(peer_source("models/gpt/gpt_layer_specs.py")))
        if isinstance(function, ast.FunctionDef) and kind in function.name
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "TransformerLayerSubmodules"
        and "linear_qkv=" in ast.unparse(call)
    ]  # fmt: skip
    assert len(found) == 1, f"{kind}: {len(found)} layers"
    return found[0]


def test_norms_of_local_layers_are_saved_under_the_names_of_fused_ones() -> None:
    renamed = ast.literal_eval(layer_arguments("_local_")["sharded_state_dict_keys_map"])
    for name, key in written_keys("local").items():
        assert key == renamed[name.removesuffix("weight")] + "weight"


def test_norms_of_transformer_engine_are_saved_where_its_modules_hold_them() -> None:
    layer, keys = layer_arguments("_transformer_engine_"), written_keys("transformer_engine")
    renamed = ast.literal_eval(layer.get("sharded_state_dict_keys_map", ast.Dict([], [])))
    assert not [name for name in (*NORMS, *keys.values()) if any(name.startswith(old) for old in renamed)]
    # The norm before the attention is a parameter of the linear layer behind it, that before the experts a module.
    assert "input_layernorm" not in layer
    assert "linear_qkv=backend.column_parallel_layer_norm_linear()" in ast.unparse(layer["self_attention"])
    provider = peer_source("extensions/transformer_engine_spec_provider.py")
    fused = re.search(r"def column_parallel_layer_norm_linear\(.*?return (\w+)", provider, re.DOTALL)
    assert fused is not None and fused[1] == "TELayerNormColumnParallelLinear"
    assert "layer_norm_weight" in peer_source("extensions/transformer_engine.py")
    assert keys["input_layernorm.weight"] == "self_attention.linear_qkv.layer_norm_weight"
    before_experts = ast.unparse(layer["pre_mlp_layernorm"])
    assert re.fullmatch(r"backend\.layer_norm\(.*\) if num_experts else IdentityOp", before_experts)
    assert keys["pre_mlp_layernorm.weight"] == "pre_mlp_layernorm.weight"
