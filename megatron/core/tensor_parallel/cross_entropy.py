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

from megatron.core.fusions import product, weight_gradient
from megatron.core.fusions.cross_entropy import SoftmaxStatistics, softmax_gradient_, softmax_statistics
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import mappings

MAX_LOGITS = 2**27
"""Logits of one piece: 4,096 tokens of a vocabulary of 32,768."""

CACHED_LOGITS = 2**20
"""Logits that a CPU makes at once, so that they are still in its cache when the softmax reads them."""

STREAMED_LOGITS = 2**22
"""The same where tiles multiply, which write past the caches anyway: fewer blocks are less work between them."""

MIN_COLUMNS = 128
"""The fewest columns that are worth a product of their own."""


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


def _blocks(weight: Tensor, vocabulary: _Vocabulary, tokens: int) -> list[_Block]:
    rows = weight.shape[0]
    if weight.is_cuda:
        longest = rows
    elif product.runs_on_tiles(weight, weight):
        longest = max(STREAMED_LOGITS // max(1, tokens), MIN_COLUMNS)
    else:
        longest = min(max(CACHED_LOGITS // max(1, tokens), MIN_COLUMNS), product.MAX_WIDTH)
    return [
        _Block(weight[place], place.start, min(max(vocabulary.columns - place.start, 0), place.stop - place.start))
        for place in product.blocks(rows, longest)
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
        piece = max(1, MAX_LOGITS // weight.shape[0])
        kept: list[Tensor] = []
        losses, logsumexps = [], []
        for part_NH, part_ids in zip(x_NH.split(piece), ids_N.split(piece), strict=True):
            merged = None
            for block in _blocks(weight, vocabulary, part_NH.shape[0]):
                statistics, softmax_NV = softmax_statistics(
                    product.product(part_NH, block.weight.t()), part_ids - block.first, block.columns
                )
                if merged is None:
                    merged = statistics
                elif block.columns:
                    merged = merged.merge(statistics)
                if x_NH.shape[0] <= piece:
                    kept += [softmax_NV, statistics.logsumexp]
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
        grad_N = grads[0].reshape(-1).to(logsumexp_N.dtype)
        # sums over blocks are rounded once
        grad_x_NH = torch.empty_like(x_NH, dtype=x.dtype if x.is_cuda else logsumexp_N.dtype)

        def write(grad_weight: Tensor, beta: float) -> None:
            for start in range(0, x_NH.shape[0], ctx.piece):
                rows = slice(start, start + ctx.piece)
                for number, block in enumerate(_blocks(weight, vocabulary, x_NH[rows].shape[0])):
                    ids = ids_N[rows] - block.first
                    if kept:
                        softmax_NV, own_logsumexp = kept[2 * number : 2 * number + 2]
                    else:
                        logits_NV = product.product(x_NH[rows], block.weight.t())
                        statistics, softmax_NV = softmax_statistics(logits_NV, ids, block.columns)
                        own_logsumexp = statistics.logsumexp
                    softmax_gradient_(softmax_NV, own_logsumexp, ids, logsumexp_N[rows], grad_N[rows], block.columns)
                    product.multiply(softmax_NV, block.weight, grad_x_NH[rows], 1.0 if number else 0.0)
                    place = slice(block.first, block.first + block.weight.shape[0])
                    product.multiply(softmax_NV.t(), x_NH[rows], grad_weight[place], beta)
                beta = 1.0

        grad_weight = weight_gradient.deliver(weight, write)
        grad_x = grad_x_NH.to(x.dtype).view_as(whole)
        if ctx.sequence_parallel:
            grad_x = mappings.reduce_scatter_first(grad_x, vocabulary.group)
        else:
            grad_x = mappings.all_reduce(grad_x, vocabulary.group)
        return grad_x, grad_weight, None, None, None


def output_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, group: Group, sequence_parallel: bool
) -> Tensor:
    """-log softmax(x W^T)[target] for each token, in float32 (float64 for float64 inputs).

    Args:
        x: [S, B, H], or this rank's slice of it along the sequence with `sequence_parallel`.
        weight: [V, H], this rank's rows of the padded vocabulary; gradients of padding rows are zero.
        targets: [S, B] int64 token ids below `vocab_size`.
        vocab_size: entries that are real; padding carries no probability.
        group: ranks that split the vocabulary.
    """
    first = weight.shape[0] * group.rank
    columns = min(max(vocab_size - first, 0), weight.shape[0])
    vocabulary = _Vocabulary(group, columns, first)
    return _OutputLoss.apply(x, weight, targets, vocabulary, sequence_parallel and group.size > 1)
