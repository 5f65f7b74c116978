"""Floating-point operations of a Mixtral model, counted from the parameters a token really uses."""

from megatron.core.config import ModelConfig


def training_flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """Operations of forward and backward for one token of a sequence of `seq_length`, without recomputation.

    Six for each weight of a matrix product the token goes through (a multiplication and an addition, once forward and
    twice backward), of which only the chosen experts count; in attention, six for each query-key and each
    probability-value product that the causal mask leaves, (seq_length + 1) / 2 a token. The embedding is a lookup.
    """
    assert config.vocab_size is not None, "the vocabulary size is not known yet"
    query_size = config.num_attention_heads * config.head_dim
    key_size = config.query_groups * config.head_dim
    attention_weights = config.hidden_size * (2 * query_size + 2 * key_size)
    expert_weights = config.moe_router_topk * 3 * config.hidden_size * config.ffn_hidden_size
    router_weights = config.num_experts * config.hidden_size
    attention_products = 2 * query_size * (seq_length + 1) / 2
    layer = attention_weights + expert_weights + router_weights + attention_products
    return 6.0 * (config.num_layers * layer + config.vocab_size * config.hidden_size)
