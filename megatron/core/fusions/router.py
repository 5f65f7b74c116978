"""Top-k choice of experts from router logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import forms


class Routing(NamedTuple):
    """Which experts each of T tokens goes to, and the statistics its auxiliary losses need."""

    probs_TK: Tensor
    """Weights of the chosen experts, summing to one for each token."""
    experts_TK: Tensor
    """int64 numbers of the chosen experts."""
    softmax_TE: Tensor
    """Softmax over all experts."""
    logsumexp_T: Tensor
    """log sum_e exp(logit_e)."""
    tokens_per_expert_E: Tensor
    """Number of (token, choice) pairs sent to each expert, in the probabilities' type."""
    capacity: int | None = None
    """Most pairs of a microbatch that an expert takes; a pair beyond it has the number of experts as its expert."""


class _Route(Function):
    """The kernels: all outputs in one pass, and their gradient in another."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
        route_forward = forms.kernel("route_forward", logits, top_k)
        assert route_forward is not None
        probs, experts, softmax, logsumexp, counts = route_forward(logits.contiguous(), top_k)
        ctx.save_for_backward(probs, experts, softmax)
        ctx.mark_non_differentiable(experts, counts)
        return probs, experts, softmax, logsumexp, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_probs, _, grad_softmax, grad_logsumexp, _ = (grad.contiguous() for grad in grads)
        arguments = (grad_probs, grad_softmax, grad_logsumexp, *ctx.saved_tensors)
        route_backward = forms.kernel("route_backward", *arguments)
        assert route_backward is not None
        return route_backward(*arguments), None


def top_k_routing(logits_TE: Tensor, top_k: int) -> Routing:
    """softmax -> top-k -> renormalise, which equals top-k -> softmax; `logits_TE` is float32 or wider."""
    if forms.kernel("route_forward", logits_TE, top_k) is not None:
        return Routing(*_Route.apply(logits_TE, top_k))
    softmax_TE = logits_TE.softmax(dim=-1)
    probs_TK, experts_TK = softmax_TE.topk(top_k, dim=-1)
    probs_TK = probs_TK / probs_TK.sum(dim=-1, keepdim=True)
    # a comparison rather than bincount, which waits for the GPU
    numbers_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    counts_E = (experts_TK.unsqueeze(-1) == numbers_E).sum(dim=(0, 1)).to(softmax_TE.dtype)
    return Routing(probs_TK, experts_TK, softmax_TE, logits_TE.logsumexp(dim=-1), counts_E)
