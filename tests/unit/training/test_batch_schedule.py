"""The batch grows with the samples consumed; counts of steps and samples follow."""

import pytest

from megatron.training.batch_schedule import BatchSchedule, build_batch_schedule


def test_the_batch_grows_in_equal_steps() -> None:
    batches = build_batch_schedule(32, (8, 8, 300), micro_batch_size=2, data_parallel_size=4)
    sizes = [batches.batch_size(samples) for samples in (0, 99, 100, 199, 200, 299, 300, 10**9)]
    assert sizes == [8, 8, 16, 16, 24, 24, 32, 32]
    assert [batches.num_microbatches(samples) for samples in (0, 100, 300)] == [1, 2, 4]


def test_steps_and_samples_are_those_of_a_run() -> None:
    batches = build_batch_schedule(32, (8, 8, 300), micro_batch_size=2, data_parallel_size=4)
    consumed = [0]
    for _ in range(40):
        consumed.append(consumed[-1] + batches.batch_size(consumed[-1]))
    for start in (0, 3, 20, 30):
        for end in range(start, 41):
            assert batches.samples_after(end - start, consumed[start]) == consumed[end]
            for extra in (0, 1, 7):  # not enough for another step
                assert batches.iterations_within(consumed[end] + extra, consumed[start]) == end - start
    assert batches.iterations_within(5, 100) == 0 and batches.samples_after(-3, 100) == 100


def test_a_constant_batch() -> None:
    assert build_batch_schedule(None, (), 3, 4) == BatchSchedule(12, 12)
    same = build_batch_schedule(12, (12, 4, 100), 3, 4)
    assert same.batch_size(0) == 12 and same.iterations_within(25) == 2


@pytest.mark.parametrize(
    ("rampup", "message"),
    [
        ((8, 8), "START INCREMENT SAMPLES"),
        ((8, 0, 100), "three positive numbers"),
        ((8, 9, 100), "steps of 9 do not lead from 8 to --global-batch-size 32"),
        ((64, 8, 100), "do not lead from 64"),
        ((8, 4, 100), r"a batch of 12 is not a multiple of .* = 8: make START and INCREMENT multiples of 8"),
    ],
)
def test_ramps_that_cannot_be_shared_out_are_refused(rampup: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch_schedule(32, rampup, micro_batch_size=2, data_parallel_size=4)
