"""Top-k choice of experts from router logits."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def top_k_routing(logits_TE: Tensor, top_k: int) -> Routing:
    """softmax -> top-k -> renormalise, which equals top-k -> softmax; `logits_TE` is float32 or wider."""
    softmax_TE = logits_TE.softmax(dim=-1)
    probs_TK, experts_TK = softmax_TE.topk(top_k, dim=-1)
    probs_TK = probs_TK / probs_TK.sum(dim=-1, keepdim=True)
    # a comparison rather than bincount, which waits for the GPU
    numbers_E = torch.arange(logits_TE.shape[-1], device=logits_TE.device)
    counts_E = (experts_TK.unsqueeze(-1) == numbers_E).sum(dim=(0, 1)).to(softmax_TE.dtype)
    return Routing(probs_TK, experts_TK, softmax_TE, logits_TE.logsumexp(dim=-1), counts_E)
