"""Leaving out what exceeds the capacity of an expert (GShard, arXiv:2006.16668, section 2.2)."""

import torch
from torch import Tensor


def within_capacity(experts_TK: Tensor, num_experts: int, capacity: int, priority_TK: Tensor | None = None) -> Tensor:
    """Which (token, choice) pairs are among the first `capacity` of their expert: int64 [T, K] -> bool [T, K].

    The first are those of highest priority, and among equals, or without priorities, those of the earliest tokens.
    """
    experts = experts_TK.reshape(-1)
    if priority_TK is not None:
        order = torch.argsort(priority_TK.reshape(-1), descending=True, stable=True)
        experts = experts[order]
    numbers = torch.arange(num_experts, device=experts.device)
    chosen = experts.unsqueeze(-1) == numbers
    place = chosen.cumsum(dim=0).gather(1, experts.unsqueeze(-1)).squeeze(-1)  # from 1
    kept = place <= capacity
    if priority_TK is not None:
        kept = torch.empty_like(kept).scatter_(0, order, kept)
    return kept.view_as(experts_TK)
