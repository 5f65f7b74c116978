"""Top-k choice of experts from router logits."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions import backend


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


class _RouterLogits(Function):
    """Keeps its operands as they are; autograd would keep the wide copy of the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = grads[0] @ weight.to(grads[0].dtype)
        grad_weight = grads[0].t() @ x.to(grads[0].dtype)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def router_logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x W^T in float32 or wider: [T, H], [E, H] -> [T, E]."""
    return _RouterLogits.apply(x_TH, weight_EH)


class _Route(Function):
    """The kernel, which makes everything in one pass and its gradient in another."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
        from megatron.core.fusions.kernels import router as kernels

        out = kernels.forward(logits.contiguous(), top_k)
        ctx.save_for_backward(out.probs_TK, out.experts_TK, out.softmax_TE)
        ctx.mark_non_differentiable(out.experts_TK, out.tokens_per_expert_E)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        from megatron.core.fusions.kernels import router as kernels

        grad_probs, _, grad_softmax, grad_logsumexp, _ = (grad.contiguous() for grad in grads)
        return kernels.backward(grad_probs, grad_softmax, grad_logsumexp, *ctx.saved_tensors), None


def top_k_routing(logits_TE: Tensor, top_k: int) -> Routing:
    """softmax -> top-k -> renormalise, which equals top-k -> softmax; `logits_TE` is float32 or wider."""
    if backend.runs_triton(logits_TE):
        return Routing(*_Route.apply(logits_TE, top_k))
    softmax_TE = logits_TE.softmax(dim=-1)
    probs_TK, experts_TK = softmax_TE.topk(top_k, dim=-1)
    probs_TK = probs_TK / probs_TK.sum(dim=-1, keepdim=True)
    # a comparison rather than bincount, which waits for the GPU
    numbers_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    counts_E = (experts_TK.unsqueeze(-1) == numbers_E).sum(dim=(0, 1)).to(softmax_TE.dtype)
    return Routing(probs_TK, experts_TK, softmax_TE, logits_TE.logsumexp(dim=-1), counts_E)
