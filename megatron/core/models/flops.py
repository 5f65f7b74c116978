"""Floating-point operations of a model, counted from the weights a token really uses."""

from collections.abc import Iterable

from megatron.core.config import ModelConfig
from megatron.core.models.weight_table import WeightRule, WeightTable


def weights_of_a_token(config: ModelConfig, rows: Iterable[WeightRule]) -> int:
    """Elements of all matrices among `rows` that one token is multiplied with: of experts, only those chosen."""
    matrices = (row for row in rows if len(row.shape) > 1)
    return sum(row.elements * (config.moe_router_topk if row.is_expert else 1) for row in matrices)


def training_flops_per_token(config: ModelConfig, table: WeightTable, seq_length: int) -> float:
    """Operations of forward and backward for one token of a sequence of `seq_length`, without recomputation.

    Six for each weight of a matrix product the token goes through (a multiplication and an addition, once forward and
    twice backward); in attention, six for each query-key and each probability-value product that the causal mask
    leaves, (seq_length + 1) / 2 a token. What comes before the layers, the embedding, is a lookup.
    """
    attention_products = 2 * config.num_attention_heads * config.head_dim * (seq_length + 1) / 2
    layer = weights_of_a_token(config, table.layer) + attention_products
    return 6.0 * (config.num_layers * layer + weights_of_a_token(config, table.last))
