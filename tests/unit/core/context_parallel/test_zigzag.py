import torch

from megatron.core.context_parallel.zigzag import positions, split_batch, split_sequence
from megatron.core.parallel_state import Group


def test_each_rank_holds_one_early_and_one_late_chunk() -> None:
    parts = [positions(4, Group((0, 1, 2), rank), torch.device("cpu")).tolist() for rank in range(3)]
    assert parts == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_all_ranks_have_the_same_number_of_visible_pairs() -> None:
    for size in (2, 3, 4):
        pairs = [
            int((positions(8, Group(tuple(range(size)), rank), torch.device("cpu")) + 1).sum()) for rank in range(size)
        ]
        assert len(set(pairs)) == 1


def test_the_batch_is_split_along_the_sequence_and_whole_in_a_group_of_one() -> None:
    batch = {"tokens": torch.arange(16).view(2, 8), "loss_mask": torch.rand(2, 8)}
    group = Group((0, 1), 1)
    split = split_batch(batch, group)
    assert split["tokens"].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert torch.equal(split["loss_mask"], split_sequence(batch["loss_mask"], group, dim=1))
    assert split_batch(batch, Group())["tokens"] is batch["tokens"]
