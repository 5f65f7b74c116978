"""Shapes without values, on torch's meta device: each makes the tensors that the kernel for a GPU makes, and no others.

So what is alive at once in a step on this device is what is alive on a GPU, where formulas would make many more.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=_wide(x))


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> tuple[Tensor, Tensor]:
    """Without the partial sums, which are small."""
    return torch.empty_like(x), inverse_rms.new_empty(x.shape[-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """As [S, B, heads, d] in memory."""
    batch, heads, length, width = x.shape
    return x.new_empty(length, batch, heads, width).permute(1, 2, 0, 3)


def swiglu(gate_up: Tensor, probs: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def swiglu_backward(grad: Tensor, gate_up: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(probs), torch.empty_like(grad)


def route_forward(logits_TE: Tensor, top_k: int) -> tuple[Tensor, ...]:
    tokens, experts = logits_TE.shape
    probs = logits_TE.new_empty(tokens, top_k)
    chosen = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
    return probs, chosen, torch.empty_like(logits_TE), logits_TE.new_empty(tokens), logits_TE.new_empty(experts)


def route_backward(grad_probs: Tensor, grad_softmax: Tensor, grad_logsumexp: Tensor, *kept: Tensor) -> Tensor:
    return torch.empty_like(grad_softmax)


def sort_pairs(experts_TK: Tensor, num_experts: int, num_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    rows = experts_TK.numel() if num_rows is None else num_rows
    ends = experts_TK.new_empty(num_experts, dtype=torch.int32)
    return experts_TK.new_empty(rows), torch.empty_like(experts_TK), ends


def gather_pairs(x_TH: Tensor, row_to_pair_R: Tensor, top_k: int) -> Tensor:
    return x_TH.new_empty(row_to_pair_R.numel(), x_TH.shape[1])


def combine_pairs(y_RH: Tensor, pair_to_row_TK: Tensor) -> Tensor:
    return y_RH.new_empty(pair_to_row_TK.shape[0], y_RH.shape[1])


def softmax_statistics_(logits_NV: Tensor, ids_N: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    largest, total, target = (logits_NV.new_empty(logits_NV.shape[0], dtype=_wide(logits_NV)) for _ in range(3))
    return largest, total, target


def softmax_gradient_(logits_NV: Tensor, *operands: Any) -> None:
    """There is nothing to write."""


def add_rows_(out_VH: Tensor, ids_N: Tensor, values_NH: Tensor) -> None:
    """There is nothing to write."""


def multiply_(a_NK: Tensor, b_KM: Tensor, out_NM: Tensor, beta: float) -> None:
    """There is nothing to write, but factors that do not fit are refused."""
    fits = a_NK.shape[1] == b_KM.shape[0] and out_NM.shape == (a_NK.shape[0], b_KM.shape[1])
    assert fits and a_NK.dtype == b_KM.dtype, (a_NK.shape, b_KM.shape, out_NM.shape)


def adamw_(*operands: Any) -> None:
    """There is nothing to write."""


def grouped_product(x: Tensor, weight_EOI: Tensor, ends_E: Tensor, transpose: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight_EOI.shape[1 if transpose else 2])


def grouped_weight_gradient_(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor, out_EOI: Tensor, beta: float) -> None:
    """There is nothing to write."""


def _context(query: Tensor) -> Tensor:
    """The output of attention lies in memory as the query does, from kernels for wider types head by head."""
    if query.dtype in (torch.bfloat16, torch.float16):
        return torch.empty_like(query)
    batch, heads, length, width = query.shape
    return query.new_empty(batch, length, heads, width).transpose(1, 2)


class _Attention(Function):
    """Keeps what FlashAttention keeps: query, key, value, output, and a logarithm for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = _context(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=_wide(query)))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Keys and values of types that no kernel with grouped heads takes are repeated."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    return _Attention.apply(query, key, value)


def attend_documents(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """All documents in one call."""
    return _Attention.apply(query, key, value)


def attention_block(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=_wide(query))


def attention_block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *operands: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
