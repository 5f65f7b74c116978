"""The sampler: the same microbatches for any number of ranks, every sample once, resume anywhere."""

import pytest

from megatron.core.datasets.sampler import PretrainingSampler


def microbatches(total: int, consumed: int, size: int, ranks: int) -> list[list[int]]:
    """All ranks' microbatches in their global order."""
    per_rank = [list(PretrainingSampler(total, consumed, size, rank, ranks)) for rank in range(ranks)]
    return [batch for step in zip(*per_rank, strict=True) for batch in step]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_microbatches_do_not_depend_on_the_ranks(ranks: int) -> None:
    expected = [[2 * i, 2 * i + 1] for i in range(24)]
    assert microbatches(48, 0, 2, ranks) == expected
    assert microbatches(48, 24, 2, ranks) == expected[12:]


def test_resuming_under_other_ranks_reads_every_sample_once() -> None:
    """Twelve samples with two ranks, then the rest with four."""
    before = [sample for batch in microbatches(40, 0, 2, 2)[:6] for sample in batch]
    after = [sample for batch in microbatches(40, len(before), 1, 4) for sample in batch]
    assert before + after == list(range(40))


def test_a_remainder_too_small_for_all_ranks_is_left_out() -> None:
    assert microbatches(11, 0, 2, 2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(PretrainingSampler(11, 0, 2, 1, 2)) == 2


@pytest.mark.parametrize(("total", "consumed"), [(0, 0), (10, 10), (10, 12), (10, 7)])
def test_a_start_with_nothing_left_is_refused(total: int, consumed: int) -> None:
    with pytest.raises(ValueError, match=f"{total} samples and {consumed} are already consumed"):
        PretrainingSampler(total, consumed, 2, 0, 2)
