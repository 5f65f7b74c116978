"""One block of attention and its backward against autograd, and several merged blocks against one call."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions import attention_block as block


def operands(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, 6, queries, 8), (2, 3, keys, 8), (2, 3, keys, 8), (2, 6, queries, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("forward", [block.attention_block, block.attention_block.__wrapped__])
@pytest.mark.parametrize("causal", [True, False])
def test_forward_equals_attention_and_the_normaliser_of_its_scores(forward, causal: bool) -> None:
    query, key, value, _ = operands(20, 20 if causal else 33)
    out, logsumexp = forward(query, key, value, causal)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    scores = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(logsumexp, scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backward", [block.attention_block_backward, block.attention_block_backward.__wrapped__])
@pytest.mark.parametrize("queries", [slice(None), slice(3, 20)])
def test_backward_of_blocks_sums_to_that_of_all_keys(backward, queries: slice) -> None:
    query, key, value, grad = operands(20, 40)
    query, grad = query[:, :, queries], grad[:, :, queries]
    leaves = [part.clone().requires_grad_() for part in (query, key, value)]
    out = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
    out.backward(grad)
    _, logsumexp = block.attention_block(query, key, value, False)
    parts = [
        backward(grad, query, key[:, :, keys], value[:, :, keys], out.detach(), logsumexp, False)
        for keys in (slice(25), slice(25, 40))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], leaves[0].grad, rtol=1e-12, atol=1e-13)
    for index in (1, 2):
        torch.testing.assert_close(
            torch.cat((parts[0][index], parts[1][index]), dim=2), leaves[index].grad, rtol=1e-12, atol=1e-13
        )
