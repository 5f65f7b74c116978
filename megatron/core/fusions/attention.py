"""Causal attention with grouped queries, over whole samples or within each of their documents."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import forms
from megatron.core.fusions.forms import operation


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a microbatch [B, S] whose samples are concatenated; none spans two samples."""

    bounds: Tensor
    """int32 [documents + 1], on the device that computes: document i is the positions bounds[i] to bounds[i + 1]."""
    lengths: tuple[int, ...]
    """Tokens of each document; on the host, so that nothing waits for the device."""

    @staticmethod
    def from_bounds(bounds: Tensor, device: torch.device) -> "Documents":
        """From bounds in the host's memory, int32 [documents + 1]."""
        lengths = tuple((bounds[1:] - bounds[:-1]).tolist())
        return Documents(bounds.to(device, non_blocking=True), lengths)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None = None) -> Tensor:
    """Attention of each position to itself and those before it, of its own document only if there are `documents`.

    query is [B, heads, S, d]; key and value are [B, groups, S, d], each group shared by heads / groups consecutive
    query heads. Returns [B, heads, S, d].
    """
    if documents is None:
        return _whole_attention(query, key, value)
    batch, heads, sequence, width = query.shape
    assert sum(documents.lengths) == batch * sequence, (documents.lengths, query.shape)
    # samples concatenated: [B * S, heads, d]
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    context = attend_documents(query, key, value, documents.bounds, documents.lengths)
    return context.view(batch, sequence, heads, width).transpose(1, 2)


@operation
def attend_documents(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal attention within each document: [tokens, heads, d], [tokens, groups, d] -> [tokens, heads, d]."""
    pieces = [part.transpose(0, 1).split(lengths, dim=1) for part in (query, key, value)]
    outputs = [_whole_attention(*(part.unsqueeze(0) for part in piece)) for piece in zip(*pieces, strict=True)]
    return torch.cat([output.squeeze(0) for output in outputs], dim=1).transpose(0, 1)


@operation
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention within each sample; differentiable."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class _Attention(Function):
    """Kernels that keep their operands, the output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
        attention_forward = forms.kernel("attention_forward", query, key, value)
        assert attention_forward is not None
        out, logsumexp = attention_forward(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        operands = (grad, *ctx.saved_tensors)
        attention_backward = forms.kernel("attention_backward", *operands)
        assert attention_backward is not None
        return attention_backward(*operands)


def _whole_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    has_kernel = forms.kernel("attention_forward", query, key, value) is not None
    return (_Attention.apply if has_kernel else attend)(query, key, value)
