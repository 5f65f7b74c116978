"""Causal attention with grouped queries, over whole samples or within each of their documents."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.attention.varlen import varlen_attn

from megatron.core.fusions import backend, product
from megatron.core.fusions.native import kernels as native

# torch 2.11 does not promise that its variable-length attention takes grouped heads; later ones do, if told so.
_VARLEN_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


NATIVE_LENGTH = 1024
"""The longest sequence that the C++ form takes: in float32 it is faster than torch's kernel up to about 2048."""

NATIVE_LENGTH_ON_TILES = 4096
"""The same for bfloat16 where tiles multiply: the longest that has been measured."""


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a microbatch [B, S] whose samples are laid end to end; none spans two samples."""

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
    query heads. Returns [B, heads, S, d]. No S x S matrix is made: CUDA has kernels for it in bfloat16 and float16,
    where documents go into one call of FlashAttention (arXiv:2307.08691); elsewhere each document is its own call.
    """
    if documents is None:
        return _attention(query, key, value)
    batch, heads, sequence, width = query.shape
    assert sum(documents.lengths) == batch * sequence, (documents.lengths, query.shape)
    # the samples end to end: [B * S, heads, d]
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half and width % 8 == 0 and width <= 256:
        context = _variable_length(query, key, value, documents)
    else:
        pieces = [part.transpose(0, 1).split(documents.lengths, dim=1) for part in (query, key, value)]
        outputs = [_attention(*(part.unsqueeze(0) for part in piece)).squeeze(0) for piece in zip(*pieces, strict=True)]
        context = torch.cat(outputs, dim=1).transpose(0, 1)
    return context.view(batch, sequence, heads, width).transpose(1, 2)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_GROUPS else {}
    if not _VARLEN_GROUPS:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    longest = max(documents.lengths)
    bounds = documents.bounds
    context = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
    assert isinstance(context, Tensor)
    return context


class _NativeAttention(Function):
    """Keeps its operands, its output and the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, logsumexp = native.attention(query, key, value)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        return native.attention_backward(grad, *ctx.saved_tensors)


def _runs_native(query: Tensor, key: Tensor, value: Tensor) -> bool:
    longest = NATIVE_LENGTH_ON_TILES if product.runs_on_tiles(query, key) else NATIVE_LENGTH
    return native.FAST_PRODUCTS and backend.runs_native(query, key, value) and 0 < query.shape[2] <= longest


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if _runs_native(query, key, value):
        return _NativeAttention.apply(query, key, value)
    if query.is_cuda and query.dtype not in (torch.bfloat16, torch.float16):
        # on CUDA only the half-precision kernels take grouped heads; others would build the whole S x S matrix
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
