"""Cross entropy over a vocabulary that is split between tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.mappings import all_reduce


class _VocabParallelCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, vocab_size: int, group: Group) -> Tensor:
        columns = logits.shape[-1]
        first = columns * group.rank
        # float32 at least, whatever the logits' type; always a copy, which becomes the softmax in place
        x = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        x[..., min(max(vocab_size - first, 0), columns) :] = float("-inf")
        x -= all_reduce(x.amax(dim=-1), group, dist.ReduceOp.MAX).unsqueeze(-1)

        ids = targets - first
        elsewhere = (ids < 0) | (ids >= columns)
        ids = ids.masked_fill(elsewhere, 0).unsqueeze(-1)
        target_logit = x.gather(-1, ids).squeeze(-1).masked_fill(elsewhere, 0)
        exp_sum = x.exp_().sum(dim=-1)
        target_logit, exp_sum = all_reduce(torch.stack((target_logit, exp_sum)), group)

        softmax = x.div_(exp_sum.unsqueeze(-1))
        ctx.save_for_backward(softmax, ids, elsewhere)
        ctx.dtype = logits.dtype
        return exp_sum.log() - target_logit

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, ids, elsewhere = ctx.saved_tensors
        one_hot = torch.where(elsewhere, 0.0, -1.0).to(softmax.dtype).unsqueeze(-1)
        grad = softmax.scatter_add(-1, ids, one_hot).mul_(grads[0].unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int, group: Group) -> Tensor:
    """-log softmax(logits)[target] for each token, in float32 (float64 for float64 logits).

    Args:
        logits: [..., V/tp] this rank's columns of the padded vocabulary.
        targets: [...] int64 global token ids below `vocab_size`.
        vocab_size: entries that are real; padding columns carry no probability and get no gradient.
        group: ranks that split the vocabulary.
    """
    return _VocabParallelCrossEntropy.apply(logits, targets, vocab_size, group)
