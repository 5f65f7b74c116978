"""Attention to documents in one call of FlashAttention (arXiv:2307.08691), on CUDA devices.

By itself, since torch takes seconds to import what it needs for it.
"""

import inspect
from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

# torch 2.11 does not promise that its variable-length attention takes grouped heads; later ones do, with a flag
_VARLEN_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_documents(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """All documents of all samples."""
    options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_GROUPS else {}
    if not _VARLEN_GROUPS:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    longest = max(lengths)
    context = varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=(-1, 0), **options)
    assert isinstance(context, Tensor)
    return context
