"""Which part of a sequence each context-parallel rank holds.

The sequence is cut into 2 x cp chunks, and rank r holds chunks r and 2 x cp - 1 - r: one early and one late, so that
all ranks have equally many earlier positions to attend to.
"""

import torch
from torch import Tensor

from megatron.core.parallel_state import Group


def split_sequence(x: Tensor, cp: Group, dim: int) -> Tensor:
    """This rank's two chunks of `dim`, one after the other: [..., S, ...] -> [..., S/cp, ...]."""
    if cp.size == 1:
        return x
    assert x.shape[dim] % (2 * cp.size) == 0, f"{x.shape[dim]} positions cannot be cut into {2 * cp.size} chunks"
    chunks = x.chunk(2 * cp.size, dim=dim)
    return torch.cat((chunks[cp.rank], chunks[-1 - cp.rank]), dim=dim)


def split_batch(batch: dict[str, Tensor], cp: Group) -> dict[str, Tensor]:
    """This rank's part of each tensor of a microbatch: [B, S] -> [B, S/cp]."""
    return {name: split_sequence(tensor, cp, dim=1) for name, tensor in batch.items()}


def positions(length: int, cp: Group, device: torch.device) -> Tensor:
    """int64 [length]: where this rank's `length` tokens stand in the whole sequence of length x cp."""
    return split_sequence(torch.arange(length * cp.size, device=device), cp, dim=0)
