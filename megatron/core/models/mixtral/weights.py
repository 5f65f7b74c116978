"""The weights of Mixtral: Megatron's name of each, its shape, how it is cut, and where Hugging Face keeps it."""

from collections.abc import Iterator

from megatron.core.config import ModelConfig
from megatron.core.models.weight_table import HuggingFaceTensor, WeightRule, WeightTable

_HERE, _THERE = "decoder.layers.{layer}", "model.layers.{layer}"
_EXPERT = f"{_HERE}.mlp.experts.local_experts.{{expert}}"
_EXPERT_THERE = f"{_THERE}.block_sparse_moe.experts.{{expert}}"


def _same(name: str, *shape: int) -> HuggingFaceTensor:
    return HuggingFaceTensor(name, shape, name, shape)


def layer_rows(model: ModelConfig) -> tuple[WeightRule, ...]:
    """The rows of a layer."""
    hidden, ffn, experts = model.hidden_size, model.ffn_hidden_size, model.num_experts
    queries, keys = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    std, output_std = model.init_method_std, model.output_init_std
    norms = [_same(f"{_THERE}.{place}_layernorm.weight", hidden) for place in ("input", "post_attention")]
    q, k, v, o = (f"{_THERE}.self_attn.{kind}_proj.weight" for kind in "qkvo")
    qkv = _same(q, queries, hidden), _same(k, keys, hidden), _same(v, keys, hidden)
    proj = _same(o, hidden, queries)
    router = f"{_THERE}.block_sparse_moe.gate.weight", (experts, hidden), f"{_THERE}.mlp.gate.weight", (experts, hidden)
    gate_up = f"{_THERE}.mlp.experts.gate_up_proj", (experts, 2 * ffn, hidden)
    gate = HuggingFaceTensor(f"{_EXPERT_THERE}.w1.weight", (ffn, hidden), *gate_up)
    up = HuggingFaceTensor(f"{_EXPERT_THERE}.w3.weight", (ffn, hidden), *gate_up, first_row=ffn)
    down_stack = f"{_THERE}.mlp.experts.down_proj", (experts, hidden, ffn)
    down = HuggingFaceTensor(f"{_EXPERT_THERE}.w2.weight", (hidden, ffn), *down_stack)
    # the rows of qkv: for each key/value group its query heads, its key, its value, so that whole groups are cut
    return (
        WeightRule(f"{_HERE}.input_layernorm.weight", (norms[0],)),
        WeightRule(
            f"{_HERE}.self_attention.linear_qkv.weight", qkv, partition_dim=0, groups=model.query_groups, init_std=std
        ),
        WeightRule(f"{_HERE}.self_attention.linear_proj.weight", (proj,), partition_dim=1, init_std=output_std),
        WeightRule(f"{_HERE}.pre_mlp_layernorm.weight", (norms[1],)),
        WeightRule(f"{_HERE}.mlp.router.weight", (HuggingFaceTensor(*router),), init_std=std),
        WeightRule(f"{_EXPERT}.linear_fc1.weight", (gate, up), partition_dim=0, partition_stride=2, init_std=std),
        WeightRule(f"{_EXPERT}.linear_fc2.weight", (down,), partition_dim=1, init_std=output_std),
    )


def mixtral_table(model: ModelConfig, padded_vocab_size: int | None = None) -> WeightTable:
    """The table of `model`; the vocabulary padded to `padded_vocab_size`."""
    assert model.vocab_size is not None, "the vocabulary size is not known yet"
    vocabulary, padded, hidden = model.vocab_size, padded_vocab_size or model.vocab_size, model.hidden_size

    def entries(name: str, source: str) -> WeightRule:
        tensor = _same(source, vocabulary, hidden)
        return WeightRule(name, (tensor,), partition_dim=0, padded_rows=padded, init_std=model.init_method_std)

    return WeightTable(
        first=(entries("embedding.word_embeddings.weight", "model.embed_tokens.weight"),),
        layer=layer_rows(model),
        last=(
            WeightRule("decoder.final_layernorm.weight", (_same("model.norm.weight", hidden),)),
            entries("output_layer.weight", "lm_head.weight"),
        ),
        num_layers=model.num_layers,
        num_experts=model.num_experts,
    )


def mixtral_weights(model: ModelConfig, padded_vocab_size: int | None = None) -> Iterator[WeightRule]:
    """Every weight of `model`, embedding first, then layer by layer; see `mixtral_table`."""
    return mixtral_table(model, padded_vocab_size).weights()
