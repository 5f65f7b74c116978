"""The table of names against a hand-written one, cutting against hand-cut tensors, config.json in both spellings."""

from dataclasses import replace

import pytest
import torch
from model_testing import join_from_tp

from megatron.core.config import ModelConfig
from megatron.core.models.mixtral.hf_config import (
    check_config_matches,
    hf_config_with_dtype,
    model_config_from_hf,
    sliding_window_from_hf,
)
from megatron.core.models.mixtral.weights import mixtral_table, mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.stages import divide_layers
from megatron.core.tensor_parallel.partition import slice_for_rank

MODEL = ModelConfig(
    num_layers=4, hidden_size=12, ffn_hidden_size=8, num_attention_heads=8, num_query_groups=4, kv_channels=2,
    vocab_size=10, num_experts=3, rotary_base=1e6,
)  # fmt: skip

HF_CONFIG = {
    "model_type": "mixtral", "num_hidden_layers": 4, "hidden_size": 12, "intermediate_size": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 2, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "vocab_size": 10, "num_local_experts": 3,
    "num_experts_per_tok": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip


def together(rule: WeightRule, parts: list[torch.Tensor], rows: range | None = None) -> torch.Tensor:
    """Some rows of a weight, from the tensors they are made of."""
    whole = torch.zeros(len(rows) if rows else rule.shape[0], *rule.shape[1:])
    for part, view in zip(parts, rule.source_views(whole, rows), strict=True):
        view.copy_(part.reshape(view.shape))
    return whole


def apart(rule: WeightRule, tensor: torch.Tensor, rows: range | None = None) -> list[torch.Tensor]:
    """What `together` was given."""
    return [view.reshape(-1, *rule.shape[1:]) for view in rule.source_views(tensor, rows)]


def test_table_is_the_documented_one() -> None:
    """Names, shapes and sources of one layer and of the ends, written out by hand."""
    found = {rule.name: rule for rule in mixtral_weights(MODEL, padded_vocab_size=16)}
    expected = {
        "embedding.word_embeddings.weight": ((16, 12), ["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": ((12,), ["model.norm.weight"]),
        "output_layer.weight": ((16, 12), ["lm_head.weight"]),
    }
    for n in range(4):
        here, there = f"decoder.layers.{n}.", f"model.layers.{n}."
        attention = there + "self_attn."
        expected |= {
            here + "input_layernorm.weight": ((12,), [there + "input_layernorm.weight"]),
            here + "self_attention.linear_qkv.weight": (
                (32, 12),
                [attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"],
            ),
            here + "self_attention.linear_proj.weight": ((12, 16), [attention + "o_proj.weight"]),
            here + "pre_mlp_layernorm.weight": ((12,), [there + "post_attention_layernorm.weight"]),
            here + "mlp.router.weight": ((3, 12), [there + "block_sparse_moe.gate.weight"]),
        }
        for e in range(3):
            expert = f"{here}mlp.experts.local_experts.{e}."
            sparse = f"{there}block_sparse_moe.experts.{e}."
            expected[expert + "linear_fc1.weight"] = ((16, 12), [sparse + "w1.weight", sparse + "w3.weight"])
            expected[expert + "linear_fc2.weight"] = ((12, 8), [sparse + "w2.weight"])
    assert {name: (rule.shape, [s.name for s in rule.sources]) for name, rule in found.items()} == expected
    assert [rule.layer for rule in mixtral_weights(MODEL)] == [None, *sorted([0, 1, 2, 3] * 11), None, None]


def test_sources_have_their_places_in_the_stacks_of_transformers_5() -> None:
    found = {rule.name: rule for rule in mixtral_weights(MODEL)}
    there = "model.layers.2.mlp."
    experts = "decoder.layers.2.mlp.experts.local_experts.1."
    gate_up, down = (f"{there}experts.gate_up_proj", (3, 16, 12)), (f"{there}experts.down_proj", (3, 12, 8))
    places = {
        f"{experts}linear_fc1.weight": [(*gate_up, 1, 0), (*gate_up, 1, 8)],
        f"{experts}linear_fc2.weight": [(*down, 1, 0)],
        "decoder.layers.2.mlp.router.weight": [(f"{there}gate.weight", (3, 12), None, 0)],
    }
    for name, expected in places.items():
        assert [(s.fused_name, s.fused_shape, s.expert, s.first_row) for s in found.pop(name).sources] == expected


def test_stages_hold_every_weight_once_and_count_layers_from_zero() -> None:
    first, last = (dict(mixtral_table(MODEL).named_weights(stage)) for (stage,) in divide_layers(4, 2))
    assert sorted(rule.name for rule in [*first.values(), *last.values()]) == sorted(
        rule.name for rule in mixtral_weights(MODEL)
    )
    assert "embedding.word_embeddings.weight" in first and "output_layer.weight" in last
    assert "decoder.final_layernorm.weight" in last and "decoder.final_layernorm.weight" not in first
    assert last["decoder.layers.1.mlp.router.weight"].name == "decoder.layers.3.mlp.router.weight"
    assert not any(name.startswith("decoder.layers.2.") for name in [*first, *last])
    one = dict(mixtral_table(MODEL).named_weights(divide_layers(4, 2)[1][0], range(1, 3)))
    name = "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight"
    assert one[name.format(0)].name == "decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"
    assert name.format(1) in one and name.format(2) not in one


def test_qkv_interleaves_by_group() -> None:
    """Rows carry their own label, and the expected order is written as a loop over groups."""
    rule = next(rule for rule in mixtral_weights(MODEL) if "qkv" in rule.name)
    query, key, value = (
        torch.arange(float(rows)).add(start).unsqueeze(1).expand(rows, 12)
        for rows, start in ((16, 100), (8, 200), (8, 300))
    )
    expected = []
    for group in range(4):
        expected += [100 + group * 4 + row for row in range(4)]
        expected += [200 + group * 2 + row for row in range(2)]
        expected += [300 + group * 2 + row for row in range(2)]
    whole = together(rule, [query, key, value])
    assert whole[:, 0].tolist() == expected
    for tensor, original in zip(apart(rule, whole), (query, key, value), strict=True):
        assert torch.equal(tensor, original)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_rank_are_those_of_its_slice(size: int) -> None:
    """Cutting as the tools do, by rows of the whole, and as the parallel layers do."""
    generator = torch.Generator().manual_seed(1)
    for rule in mixtral_weights(MODEL, padded_vocab_size=16):
        sources = [torch.randn(source.shape, generator=generator) for source in rule.sources]
        whole = together(rule, sources)
        assert whole.shape == rule.shape
        ranks = []
        for rank in range(size):
            ranks.append(slice_for_rank(whole, rule.partition_dim, rule.partition_stride, rank, size))
            assert tuple(ranks[-1].shape) == rule.part_shape(size)
            if rule.partition_dim == 0:
                rows = torch.cat([whole[part.start : part.stop] for part in rule.part_rows(rank, size)])
                assert torch.equal(ranks[-1], rows)
        joined = join_from_tp(ranks, rule.partition_dim, rule.partition_stride)
        for tensor, original in zip(apart(rule, joined), sources, strict=True):
            assert torch.equal(tensor, original), rule.name


@pytest.mark.parametrize("at_most", [1, 3, 5, 1000])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_rows_are_made_of_rows_of_the_sources(size: int, at_most: int) -> None:
    """A few rows at a time, both ways; none of them belongs to two ranks."""
    generator = torch.Generator().manual_seed(1)
    for rule in mixtral_weights(MODEL, padded_vocab_size=16):
        sources = [torch.randn(source.shape, generator=generator) for source in rule.sources]
        whole = together(rule, sources)
        back: dict[str, list[torch.Tensor]] = {source.name: [] for source in rule.sources}
        done = 0
        for rows in rule.chunks(size, at_most):
            assert rows.start == done
            assert len(rows) <= max(at_most, rule.shape[0] // rule.groups if rule.groups > 1 else 1)
            done = rows.stop
            pieces = [
                sources[rule.sources.index(source)][part.start : part.stop] for source, part in rule.source_rows(rows)
            ]
            assert torch.equal(together(rule, pieces, rows), whole[rows.start : rows.stop]), rule.name
            if rule.partition_dim == 0:
                held = rule.part_rows(rule.owner(rows, size), size)
                assert any(part.start <= rows.start and rows.stop <= part.stop for part in held)
            parts = apart(rule, whole[rows.start : rows.stop], rows)
            for (source, _), part in zip(rule.source_rows(rows), parts, strict=True):
                back[source.name].append(part)
        assert done == rule.shape[0]
        for tensor, parts in zip(sources, back.values(), strict=True):
            assert torch.equal(torch.cat(parts), tensor), rule.name


def test_groups_that_do_not_divide_are_refused() -> None:
    single = replace(MODEL, num_query_groups=1)
    rule = next(rule for rule in mixtral_weights(single) if "qkv" in rule.name)
    with pytest.raises(ValueError, match="are not divisible by 2"):
        rule.part_shape(2)


def test_stride_keeps_gate_and_up_apart() -> None:
    gate_up = torch.tensor([10, 11, 12, 13, 20, 21, 22, 23]).unsqueeze(1)
    parts = [slice_for_rank(gate_up, 0, 2, rank, 2) for rank in range(2)]
    assert [part[:, 0].tolist() for part in parts] == [[10, 11, 20, 21], [12, 13, 22, 23]]
    assert torch.equal(join_from_tp(parts, 0, 2), gate_up)
    columns = [slice_for_rank(gate_up.T, 1, 1, rank, 4) for rank in range(4)]
    assert [part.tolist() for part in columns] == [[[10, 11]], [[12, 13]], [[20, 21]], [[22, 23]]]
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        slice_for_rank(gate_up, 0, 2, 0, 3)


def test_copies_that_differ_between_ranks_are_refused() -> None:
    same = torch.ones(3)
    assert join_from_tp([same, same.clone()], None, 1) is same
    with pytest.raises(ValueError, match="differs between ranks 0 and 1"):
        join_from_tp([same, same * 2], None, 1)


def test_config_in_both_spellings() -> None:
    expected = replace(MODEL, params_dtype="bfloat16", max_position_embeddings=32768)
    assert model_config_from_hf(HF_CONFIG) == expected
    new = {key: value for key, value in HF_CONFIG.items() if key not in ("rope_theta", "torch_dtype")}
    new |= {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert model_config_from_hf(new) == expected
    check_config_matches(expected, new)
    assert model_config_from_hf({**HF_CONFIG, "head_dim": None, "hidden_size": 16}).head_dim == 2
    assert model_config_from_hf({**HF_CONFIG, "num_key_value_heads": None}).query_groups == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "no rope theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "no rope theta"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "different rope thetas"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "only plain rotary"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "mistral"}, "model_type"),
        ({"num_local_experts": None}, "num_local_experts"),
        ({"hidden_size": "12"}, "hidden_size must be a number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a number"),
        ({"vocab_size": 10.5}, "vocab_size must be a whole number"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_config_that_cannot_be_kept_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_config_from_hf({**HF_CONFIG, **change})


def test_config_of_another_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"num_local_experts is 8 in config.json but 3 in the checkpoint"):
        check_config_matches(MODEL, {**HF_CONFIG, "num_local_experts": 8})
    with pytest.raises(ValueError, match=r"rope_theta is 10000\.0"):
        check_config_matches(MODEL, {**HF_CONFIG, "rope_theta": 10000.0})


def test_exported_config_keeps_every_field() -> None:
    source = {**HF_CONFIG, "something_else": [1, 2]}
    assert hf_config_with_dtype(source, "bfloat16") == source
    assert hf_config_with_dtype(source, "float32") == {**source, "torch_dtype": "float32"}


@pytest.mark.parametrize(("window", "expected"), [(None, None), (4096, 4096), (32768, None)])
def test_sliding_window(window: int | None, expected: int | None) -> None:
    assert sliding_window_from_hf({**HF_CONFIG, "sliding_window": window}) == expected
