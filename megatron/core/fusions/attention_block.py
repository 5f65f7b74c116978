"""Attention to one block of keys, with the logarithm of its normaliser, so that several blocks can be merged.

B batch, h query heads, g key heads, each shared by h/g consecutive query heads, d head width. With p = exp(s - L), L
the log-sum-exp over the keys of all blocks, the backward of one block needs nothing of the others (arXiv:2307.08691).
The formulas hold the whole Q x K matrix in memory.
"""

import math

import torch
from torch import Tensor

from megatron.core.fusions.forms import operation


def _scores(query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores [B, g, n, Q, K], queries [B, g, n, Q, d] and keys [B, g, 1, K, d], all in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query = query.to(wide).unflatten(1, (key.shape[1], -1))
    key = key.to(wide).unsqueeze(2)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores, query, key


@operation
def attention_block(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d)) v over the keys given, and the log-sum-exp of each row; not differentiable.

    query [B, h, Q, d]; key and value [B, g, K, d]; `causal` needs Q = K. Returns [B, h, Q, d] in the query's type and
    [B, h, Q] in float32 or wider.
    """
    scores, _, _ = _scores(query, key, causal)
    logsumexp = scores.logsumexp(dim=-1)
    out = (scores - logsumexp.unsqueeze(-1)).exp() @ value.to(scores.dtype).unsqueeze(2)
    return out.flatten(1, 2).to(query.dtype), logsumexp.flatten(1, 2)


@operation
def attention_block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of one block.

    `out` and `logsumexp` are those of all blocks together, `grad` is the gradient of that `out`.
    """
    groups = (key.shape[1], -1)
    scores, wide_query, wide_key = _scores(query, key, causal)
    wide = scores.dtype
    probs = (scores - logsumexp.unflatten(1, groups).unsqueeze(-1)).exp()
    grad, out = (part.to(wide).unflatten(1, groups) for part in (grad, out))
    grad_value = (probs.transpose(-1, -2) @ grad).sum(dim=2)
    # softmax backward: ds = p (dp - sum_k p dp), and that sum is the row's grad . out
    grad_probs = grad @ value.to(wide).unsqueeze(2).transpose(-1, -2)
    grad_scores = probs * (grad_probs - (grad * out).sum(dim=-1, keepdim=True)) / math.sqrt(query.shape[-1])
    grad_query = (grad_scores @ wide_key).flatten(1, 2)
    grad_key = (grad_scores.transpose(-1, -2) @ wide_query).sum(dim=2)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
