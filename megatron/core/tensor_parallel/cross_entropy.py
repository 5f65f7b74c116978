"""The output layer and its cross entropy as one operation, over a vocabulary split between tensor-parallel ranks.

Logits are made for some tokens at a time. Where all fit into one piece they are kept and become their own gradient in
the backward pass; otherwise they are made again there, at the price of a third product, so that a long sequence times
the vocabulary never exists at once. N tokens, H hidden, V columns of the padded vocabulary on this rank.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron.core.fusions.cross_entropy import (
    SoftmaxStatistics,
    softmax_gradient_,
    softmax_statistics,
    vocabulary_blocks,
)
from megatron.core.fusions.linear import forward_product, multiply_
from megatron.core.fusions.weight_gradient import deliver
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import mappings

MAX_LOGITS = 2**27
"""Logits of one piece: 4,096 tokens of a vocabulary of 32,768."""
_ALIGNED_TOKENS = 64
"""A piece that begins elsewhere would be one more variant of each kernel, compiled in the middle of a step."""


class _Vocabulary(NamedTuple):
    group: Group
    columns: int
    """Columns of this rank that are not padding."""
    first: int
    """The first column's entry in the whole vocabulary."""


class _Block(NamedTuple):
    """Columns of this rank whose logits are made at once."""

    weight: Tensor
    """Their rows of the weight."""
    first: int
    columns: int
    """How many of them are not padding."""


def _tokens_at_once(columns: int) -> int:
    """How many tokens' logits make a piece; a number of them that keeps the tensors of every piece aligned, if many."""
    tokens = max(1, MAX_LOGITS // columns)
    return tokens if tokens < _ALIGNED_TOKENS else tokens // _ALIGNED_TOKENS * _ALIGNED_TOKENS


def _blocks(weight: Tensor, vocabulary: _Vocabulary, tokens: int) -> list[_Block]:
    return [
        _Block(weight[place], place.start, min(max(vocabulary.columns - place.start, 0), place.stop - place.start))
        for place in vocabulary_blocks(weight, tokens)
    ]


def _losses(statistics: SoftmaxStatistics, group: Group) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[target] and log sum exp of each token; collective over the group."""
    largest, total, target = statistics
    everywhere = mappings.all_reduce(largest, group, dist.ReduceOp.MAX)
    total, target = mappings.all_reduce(torch.stack((total * (largest - everywhere).exp(), target)), group)
    logsumexp = everywhere + total.log()
    return logsumexp - target, logsumexp


class _OutputLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: _Vocabulary, sequence_parallel: bool
    ) -> Tensor:
        whole = mappings.all_gather_first(x, vocabulary.group) if sequence_parallel else x
        x_NH, ids_N = whole.reshape(-1, whole.shape[-1]), targets.reshape(-1) - vocabulary.first
        piece = _tokens_at_once(weight.shape[0])
        kept: list[Tensor] = []
        losses, logsumexps = [], []
        for part_NH, part_ids in zip(x_NH.split(piece), ids_N.split(piece), strict=True):
            merged = None
            for block in _blocks(weight, vocabulary, part_NH.shape[0]):
                logits_NV = forward_product(part_NH, block.weight)
                statistics = softmax_statistics(logits_NV, part_ids - block.first, block.columns)
                if merged is None:
                    merged = statistics
                elif block.columns:
                    merged = merged.merge(statistics)
                if x_NH.shape[0] <= piece:
                    kept += [logits_NV, statistics.logsumexp]
            assert merged is not None
            loss, logsumexp = _losses(merged, vocabulary.group)
            losses.append(loss)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(x, ids_N, torch.cat(logsumexps), *kept)
        ctx.weight, ctx.vocabulary, ctx.sequence_parallel, ctx.piece = weight, vocabulary, sequence_parallel, piece
        return torch.cat(losses).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, ids_N, logsumexp_N, *kept = ctx.saved_tensors
        weight, vocabulary = ctx.weight, ctx.vocabulary
        whole = mappings.all_gather_first(x, vocabulary.group) if ctx.sequence_parallel else x
        x_NH = whole.reshape(-1, whole.shape[-1])
        grad_N = grads[0].reshape(-1).to(logsumexp_N.dtype).contiguous()  # that of a sum is one number, expanded
        one_block = len(_blocks(weight, vocabulary, min(ctx.piece, x_NH.shape[0]))) == 1
        # sums over blocks are rounded once
        grad_x_NH = torch.empty_like(x_NH, dtype=x.dtype if one_block else logsumexp_N.dtype)

        def write(grad_weight: Tensor | None, beta: float) -> None:
            for start in range(0, x_NH.shape[0], ctx.piece):
                rows = slice(start, start + ctx.piece)
                for number, block in enumerate(_blocks(weight, vocabulary, x_NH[rows].shape[0])):
                    ids = ids_N[rows] - block.first
                    if kept:
                        logits_NV, own_logsumexp = kept[2 * number : 2 * number + 2]
                    else:
                        logits_NV = forward_product(x_NH[rows], block.weight)
                        own_logsumexp = softmax_statistics(logits_NV, ids, block.columns).logsumexp
                    softmax_gradient_(logits_NV, own_logsumexp, ids, logsumexp_N[rows], grad_N[rows], block.columns)
                    multiply_(logits_NV, block.weight, grad_x_NH[rows], 1.0 if number else 0.0)
                    place = slice(block.first, block.first + block.weight.shape[0])
                    if grad_weight is not None:
                        multiply_(logits_NV.t(), x_NH[rows], grad_weight[place], beta)
                beta = 1.0

        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = deliver(weight, write)
        else:
            write(None, 0.0)
        grad_x = grad_x_NH.to(x.dtype).view_as(whole)
        if ctx.sequence_parallel:
            grad_x = mappings.reduce_scatter_first(grad_x, vocabulary.group)
        else:
            grad_x = mappings.all_reduce(grad_x, vocabulary.group)
        return grad_x, grad_weight, None, None, None


def output_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group: Group, sequence_parallel: bool
) -> Tensor:
    """-log softmax(x W^T)[target] for each token, in float32 (float64 for float64 inputs): [S, B].

    x is [S, B, H], or this rank's slice of it along the sequence with `sequence_parallel`; targets are int64 [S, B],
    below `vocab_size`. The weight [V, H] has this rank's rows of the padded vocabulary; padding carries no probability,
    and its gradient is zero.
    """
    first = weight.shape[0] * group.rank
    columns = min(max(vocab_size - first, 0), weight.shape[0])
    vocabulary = _Vocabulary(group, columns, first)
    return _OutputLoss.apply(x, weight, targets, vocabulary, sequence_parallel and group.size > 1)
