"""Floating-point operations against a count by hand."""

from megatron.core.config import ModelConfig
from megatron.core.models.flops import training_flops_per_token
from megatron.core.models.mixtral.weights import mixtral_table


def test_mixtral_8x7b_by_hand() -> None:
    model = ModelConfig(num_query_groups=8, vocab_size=32000)
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2  # q and o, k and v
    layer += 2 * 3 * 4096 * 14336 + 8 * 4096  # two experts, the router
    attention = sum(2 * 4096 * (position + 1) for position in range(4096)) / 4096  # q.k and p.v, causal
    assert training_flops_per_token(model, mixtral_table(model), 4096) == 6 * (32 * (layer + attention) + 32000 * 4096)
