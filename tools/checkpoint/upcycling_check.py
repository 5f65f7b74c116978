"""Logits of a dense model and of the Mixtral made of it, computed side by side with one layer in memory at a time."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F

from megatron.core.fusions.rotary import rotary_tables
from megatron.core.interchange.element_types import to_torch
from megatron.core.microbatch import Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.transformer_layer import TransformerLayer
from tools.checkpoint.stream import Source

_TOKENS = 16
_TOLERANCE = 1e-9


@torch.no_grad()
def check_logits(source: Source) -> float:
    """The largest difference of the two models' logits, in float64. `source` has no noise: all experts are the MLP.

    The dense model's MLP is computed here; everything else is the same for both. Raises ValueError if they differ by
    more than rounding.
    """

    model = replace(source.description.model, params_dtype="float64")
    rules = {rule.name: rule for rule in mixtral_weights(model)}
    assert model.vocab_size is not None

    def read(name: str) -> torch.Tensor:
        rule = rules[name]
        return torch.cat([_read(source, rule, rows) for rows in _all_rows(rule)])

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab_size, (_TOKENS,), generator=generator)
    sparse = read("embedding.word_embeddings.weight")[tokens].unsqueeze(1)
    dense = sparse
    rotary = rotary_tables(torch.arange(_TOKENS).unsqueeze(0), model.head_dim, model.rotary_base, torch.float64)
    microbatch = Microbatch(rotary=rotary)
    meta = torch.device("meta")
    stage = MixtralModel(replace(model, num_layers=1), groups=ProcessGroups(), sequence_parallel=False, device=meta)
    layer, norm = cast(TransformerLayer, stage.decoder.layers[0]), stage.decoder.final_layernorm
    for number in range(model.num_layers):
        prefix = f"decoder.layers.{number}."
        gate_up, down = (_common(source, rules, f"{prefix}mlp.experts", kind) for kind in ("linear_fc1", "linear_fc2"))
        for name, parameter in list(layer.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            if ".experts." in name:  # all of them are the same, and take the memory of one
                value = (gate_up if "fc1" in name else down).expand(model.num_experts, -1, -1)
            else:
                value = read(prefix + name)
            new = torch.nn.Parameter(value, requires_grad=False)
            new.__dict__.update(parameter.__dict__)
            setattr(layer.get_submodule(owner), leaf, new)
        sparse, _ = layer(sparse, microbatch)
        attended = dense + layer.self_attention(layer.input_layernorm(dense), microbatch)
        gate, up = F.linear(layer.pre_mlp_layernorm(attended), gate_up).chunk(2, dim=-1)
        dense = attended + F.linear(F.silu(gate) * up, down)
    assert norm is not None
    norm.to_empty(device="cpu")
    norm.weight.copy_(read("decoder.final_layernorm.weight"))
    difference, largest = 0.0, 0.0
    rule = rules["output_layer.weight"]
    for rows in _all_rows(rule):
        weight = _read(source, rule, rows)
        ours, theirs = (F.linear(norm(hidden), weight) for hidden in (sparse, dense))
        difference = max(difference, (ours - theirs).abs().max().item())
        largest = max(largest, theirs.abs().max().item())
    if not difference <= _TOLERANCE * largest:
        raise ValueError(
            f"the Mixtral's logits differ from the dense model's by {difference:.1e} (of {largest:.1e}) before noise"
        )
    return difference


def _common(source: Source, rules: dict[str, WeightRule], experts: str, kind: str) -> torch.Tensor:
    """The one matrix that all experts of a layer have. Raises ValueError if one has another."""
    parts = []
    for rows in _all_rows(rules[f"{experts}.local_experts.0.{kind}.weight"]):
        copies = [
            _read(source, rules[f"{experts}.local_experts.{expert}.{kind}.weight"], rows)
            for expert in range(source.description.model.num_experts)
        ]
        for expert, copy in enumerate(copies):
            if not torch.equal(copies[0], copy):
                raise ValueError(f"{experts}: expert {expert} differs from expert 0 before noise")
        parts.append(copies[0])
    return torch.cat(parts)


def _read(source: Source, rule: WeightRule, rows: range) -> torch.Tensor:
    return to_torch(source.read(rule, rows), source.description.dtype).double()


def _all_rows(rule: WeightRule) -> Iterator[range]:
    return rule.chunks(1, 4096)
