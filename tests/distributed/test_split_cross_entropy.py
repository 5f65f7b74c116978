"""The loss over a split vocabulary whose last rank holds nothing but padding, in any number of blocks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_testing import run_distributed
from torch import Tensor

from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel import cross_entropy
from megatron.core.tensor_parallel.cross_entropy import output_cross_entropy

VOCABULARY, PADDED, RANKS = 20, 48, 3


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((7, 2, 6), (PADDED, 6)))
    return x, weight, torch.randint(0, VOCABULARY, (7, 2), generator=generator)


def split_loss(rank: int, world_size: int, columns_in_a_block: int, pieces: int) -> list[Tensor]:
    cross_entropy.CACHED_LOGITS, cross_entropy.MIN_COLUMNS = 0, columns_in_a_block
    cross_entropy.MAX_LOGITS = 14 * PADDED // world_size // pieces
    x, weight, targets = operands()
    x, weight = x.requires_grad_(), weight.chunk(world_size)[rank].clone().requires_grad_()
    group = Group(tuple(range(world_size)), rank, dist.group.WORLD)
    loss = output_cross_entropy(x, weight, targets, VOCABULARY, group, False)
    loss.square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return [loss.detach(), x.grad, weight.grad]


@pytest.mark.parametrize(("columns_in_a_block", "pieces"), [(3, 1), (5, 3), (PADDED, 1)])
def test_equals_the_loss_over_the_whole_vocabulary(columns_in_a_block: int, pieces: int) -> None:
    x, weight, targets = operands()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    logits = (x @ weight.t())[..., :VOCABULARY]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    expected.square().sum().backward()
    results = run_distributed(split_loss, RANKS, columns_in_a_block, pieces)
    for rank, (loss, grad_x, grad_weight) in enumerate(results):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_x, x.grad, rtol=1e-12, atol=1e-12)
        assert weight.grad is not None
        torch.testing.assert_close(grad_weight, weight.grad.chunk(RANKS)[rank], rtol=1e-12, atol=1e-12)
