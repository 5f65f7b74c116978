"""Softmax, top-k, renormalisation and load statistics of the router in one pass over its logits.

T tokens, E experts, K experts a token. Sums over tokens are made block by block, then over blocks: no atomics, so
that they are repeatable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS, MAX_NUMBERS = 64, 1024


def _block(experts: int) -> dict[str, int]:
    """The tokens of a program: as many as leave the numbers of all their experts in registers."""
    block = triton.next_power_of_2(experts)
    return {"TOKENS": max(1, min(MAX_TOKENS, MAX_NUMBERS // block)), "BLOCK_E": block}


@triton.jit(do_not_specialize=["tokens"])
def _forward(
    logits_ptr, probs_ptr, experts_ptr, softmax_ptr, logsumexp_ptr, partial_counts_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token = block * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK_E)
    live = token < tokens
    inside = live[:, None] & (expert < E)[None, :]
    logits = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=inside, other=float("-inf"))
    logits = tl.where(live[:, None], logits, 0.0)
    largest = tl.max(logits, axis=1)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.sum(exponentials, axis=1)
    softmax = exponentials / total[:, None]
    tl.store(softmax_ptr + token[:, None] * E + expert[None, :], softmax, mask=inside)
    tl.store(logsumexp_ptr + token, largest + tl.log(total), mask=live)

    # the choices are made twice, first to know their sum: what was stored cannot be read back within a program
    # (a NaN, which loses every comparison, would make argmax return an expert that does not exist)
    candidates = tl.where((expert < E)[None, :], tl.where(softmax == softmax, softmax, 0.0), -1.0)
    left = candidates
    chosen_total = tl.zeros((TOKENS,), tl.float32)
    for _ in tl.static_range(K):
        is_chosen = expert[None, :] == tl.argmax(left, axis=1)[:, None]
        chosen_total += tl.sum(tl.where(is_chosen, softmax, 0.0), axis=1)
        left = tl.where(is_chosen, -1.0, left)
    left = candidates
    counts = tl.zeros((BLOCK_E,), tl.float32)
    for k in tl.static_range(K):
        choice = tl.argmax(left, axis=1)
        is_chosen = expert[None, :] == choice[:, None]
        prob = tl.sum(tl.where(is_chosen, softmax, 0.0), axis=1) / chosen_total
        tl.store(probs_ptr + token * K + k, prob, mask=live)
        tl.store(experts_ptr + token * K + k, choice.to(tl.int64), mask=live)
        counts += tl.sum(tl.where(is_chosen & live[:, None], 1.0, 0.0), axis=0)
        left = tl.where(is_chosen, -1.0, left)
    tl.store(partial_counts_ptr + block * E + expert, counts, mask=expert < E)


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    grad_probs_ptr, grad_softmax_ptr, grad_logsumexp_ptr, probs_ptr, experts_ptr, softmax_ptr, grad_logits_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, BLOCK_E)
    live = token < tokens
    inside = live[:, None] & (expert < E)[None, :]
    place = token[:, None] * E + expert[None, :]
    softmax = tl.load(softmax_ptr + place, mask=inside, other=0.0)
    grad = tl.load(grad_softmax_ptr + place, mask=inside, other=0.0)
    # w_k = p_k / s with s the chosen experts' sum: dp_k += (dw_k - sum_j dw_j w_j) / s
    chosen_total = tl.zeros((TOKENS,), tl.float32)
    mean = tl.zeros((TOKENS,), tl.float32)
    for k in tl.static_range(K):
        choice = tl.load(experts_ptr + token * K + k, mask=live, other=0)
        is_chosen = expert[None, :] == choice[:, None]
        chosen_total += tl.sum(tl.where(is_chosen, softmax, 0.0), axis=1)
        grad_prob = tl.load(grad_probs_ptr + token * K + k, mask=live, other=0.0)
        mean += grad_prob * tl.load(probs_ptr + token * K + k, mask=live, other=0.0)
    chosen_total = tl.where(live, chosen_total, 1.0)
    for k in tl.static_range(K):
        choice = tl.load(experts_ptr + token * K + k, mask=live, other=0)
        grad_prob = tl.load(grad_probs_ptr + token * K + k, mask=live, other=0.0)
        is_chosen = expert[None, :] == choice[:, None]
        grad += tl.where(is_chosen, ((grad_prob - mean) / chosen_total)[:, None], 0.0)
    # dlogit = p (dp - sum_e dp_e p_e) + p dlogsumexp
    inner = tl.sum(grad * softmax, axis=1)
    grad_logsumexp = tl.load(grad_logsumexp_ptr + token, mask=live, other=0.0)
    tl.store(grad_logits_ptr + place, softmax * (grad - inner[:, None] + grad_logsumexp[:, None]), mask=inside)


def route_forward(logits_TE: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """The first five of `Routing` for contiguous float32 logits; of equal experts the one with the smaller number."""
    tokens, experts = logits_TE.shape
    probs = logits_TE.new_empty((tokens, top_k))
    chosen = torch.empty((tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    softmax, logsumexp = torch.empty_like(logits_TE), logits_TE.new_empty(tokens)
    sizes = _block(experts)
    blocks = triton.cdiv(tokens, sizes["TOKENS"])
    partial_counts = logits_TE.new_empty((blocks, experts))
    if tokens:
        _forward[(blocks,)](
            logits_TE, probs, chosen, softmax, logsumexp, partial_counts, tokens,
            E=experts, K=top_k, **sizes,
        )  # fmt: skip
    return probs, chosen, softmax, logsumexp, partial_counts.sum(dim=0)


def route_backward(
    grad_probs_TK: Tensor,
    grad_softmax_TE: Tensor,
    grad_logsumexp_T: Tensor,
    probs_TK: Tensor,
    experts_TK: Tensor,
    softmax_TE: Tensor,
) -> Tensor:
    """Gradient of the logits [T, E] from those of the three differentiable outputs; all contiguous."""
    tokens, experts = softmax_TE.shape
    grad_logits = torch.empty_like(softmax_TE)
    if tokens:
        sizes = _block(experts)
        _backward[(triton.cdiv(tokens, sizes["TOKENS"]),)](
            grad_probs_TK, grad_softmax_TE, grad_logsumexp_T, probs_TK, experts_TK, softmax_TE, grad_logits, tokens,
            E=experts, K=probs_TK.shape[1], **sizes,
        )  # fmt: skip
    return grad_logits
