"""What worker processes answer arrives whole, whatever its size."""

from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import pytest

from tools.preprocessing.pool import Slots

SLOT = 64


def answers(number: int) -> list[np.ndarray]:
    """Arrays that fill a slot but for its alignment, go beyond it by one byte, or are empty; all differ by number."""
    sizes = [(3, 56), (0, 1), (64,), (65,), (49, 8), (57, 8), (0,), (1000, 1)][number % 8]
    return [(np.arange(size) + number).astype(np.uint8) for size in sizes]


def send_all(slots: Slots, pipe: Connection, count: int) -> None:
    for number in range(count):
        slots.send(pipe, number, (answers(number), str(number)))
        pipe.recv()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_answers_arrive_and_stay_until_their_slot_is_used_again(count: int) -> None:
    context = get_context("fork")
    slots = Slots(count, SLOT)
    ours, theirs = context.Pipe()
    process = context.Process(target=send_all, args=(slots, theirs, 24), daemon=True)
    process.start()
    kept = []
    for expected in range(24):
        number, (arrays, text) = slots.receive(ours)
        assert (number, text) == (expected, str(expected))
        kept = [*kept[1 - count :], (number, arrays)] if count > 1 else [(number, arrays)]
        for each, found in kept:
            assert [array.tolist() for array in found] == [array.tolist() for array in answers(each)]
        ours.send("next")
    process.join()
    assert process.exitcode == 0
