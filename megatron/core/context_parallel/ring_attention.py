"""Causal attention over a sequence that is split between ranks: keys and values travel in a ring (arXiv:2310.01889).

Each rank keeps its queries. In step i it attends to the keys that rank r - i owns, while the next ones are on their
way. The partial results are merged by their log-sum-exp in float32 or wider. In the backward pass the gradients of keys
and values travel with them, each rank adding its share, and arrive at their owner.

With the zigzag split (`zigzag.py`) a rank attends to all of its own block causally, with all of its queries to the
early half of the blocks of ranks before it, and with its late half to the whole blocks of ranks after it: in every step
after the first the same amount of work on every rank.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.core import collectives
from megatron.core.fusions.attention_block import attention_block, attention_block_backward
from megatron.core.parallel_state import Group


class _InFlight(NamedTuple):
    """A block that is being passed on, and the one that will have arrived when all requests are done."""

    requests: list[Any]
    arriving: Tensor
    leaving: Tensor

    def finish(self) -> Tensor:
        for request in self.requests:
            collectives.wait(request)
        return self.arriving


def _pass_on(block: Tensor, cp: Group) -> _InFlight:
    """Starts sending a contiguous block to the next rank of the ring and receiving the previous one's."""
    arriving = torch.empty_like(block)
    following, previous = cp.ranks[(cp.rank + 1) % cp.size], cp.ranks[cp.rank - 1]
    requests = collectives.batch_isend_irecv(
        [dist.P2POp(dist.isend, block, following, cp.handle), dist.P2POp(dist.irecv, arriving, previous, cp.handle)]
    )
    return _InFlight(requests, arriving, block)


def _visible(step: int, cp: Group, length: int) -> tuple[slice, slice, bool]:
    """Which queries attend to which keys of the block that arrives in `step`, and whether causally within it."""
    source, half = (cp.rank - step) % cp.size, length // 2
    if source == cp.rank:
        return slice(None), slice(None), True
    return (slice(None), slice(half), False) if source < cp.rank else (slice(half, None), slice(None), False)


def _merge(out: Tensor, logsumexp: Tensor, block_out: Tensor, block_logsumexp: Tensor) -> None:
    """Adds a block's result to `out` and `logsumexp`, in place and in their type."""
    total = torch.logaddexp(logsumexp, block_logsumexp.to(logsumexp.dtype))
    out.mul_((logsumexp - total).exp().unsqueeze(-1))
    out.addcmul_(block_out.to(out.dtype), (block_logsumexp - total).exp().unsqueeze(-1))
    logsumexp.copy_(total)


class _RingAttention(Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cp: Group) -> Tensor:
        ctx.cp = cp
        keys_values = torch.stack((key, value))
        wide = torch.promote_types(query.dtype, torch.float32)
        for step in range(cp.size):
            coming = _pass_on(keys_values, cp) if step + 1 < cp.size else None
            queries, keys, causal = _visible(step, cp, query.shape[2])
            block_key, block_value = keys_values[:, :, :, keys]
            block_out, block_logsumexp = attention_block(query[:, :, queries], block_key, block_value, causal)
            if step == 0:
                out, logsumexp = block_out.to(wide), block_logsumexp.to(wide)
            else:
                _merge(out[:, :, queries], logsumexp[:, :, queries], block_out, block_logsumexp)
            if coming is not None:
                keys_values = coming.finish()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, logsumexp = ctx.saved_tensors
        cp: Group = ctx.cp
        wide = logsumexp.dtype
        keys_values = torch.stack((key, value))
        grad_query = torch.zeros(query.shape, dtype=wide, device=query.device)
        coming_grad: _InFlight | None = None
        for step in range(cp.size):
            coming = _pass_on(keys_values, cp) if step + 1 < cp.size else None
            rows, keys, causal = _visible(step, cp, query.shape[2])
            block_key, block_value = keys_values[:, :, :, keys]
            block_query, *block = attention_block_backward(
                grads[0][:, :, rows], query[:, :, rows], block_key, block_value, out[:, :, rows],
                logsumexp[:, :, rows], causal,
            )  # fmt: skip
            grad_query[:, :, rows] += block_query
            # the gradients of the block come from the rank that had it in the step before
            if coming_grad is None:
                grad_keys_values = torch.stack(block).to(wide)
            else:
                grad_keys_values = coming_grad.finish()
                grad_keys_values[:, :, :, keys] += torch.stack(block)
            coming_grad = _pass_on(grad_keys_values, cp)
            if coming is not None:
                keys_values = coming.finish()
        assert coming_grad is not None
        grad_key, grad_value = coming_grad.finish().to(key.dtype)
        return grad_query.to(query.dtype), grad_key, grad_value, None


def ring_attention(query: Tensor, key: Tensor, value: Tensor, cp: Group) -> Tensor:
    """Causal attention over the whole sequence, of which this rank holds its zigzag part.

    query is [B, heads, S/cp, d]; key and value are [B, groups, S/cp, d], each group shared by heads / groups
    consecutive query heads; only the groups are sent. Returns [B, heads, S/cp, d]. Collective over `cp`.
    """
    assert cp.size > 1, "a sequence on one rank needs no ring"
    return _RingAttention.apply(query, key, value, cp)
