"""Processes of one start find each other in a store in which those of earlier ones have left their words."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.training.restarts import agree_on_round


def meet(store: dist.Store, world_size: int) -> set[str]:
    """What the ranks of a start agree on, each in a thread."""
    found: list[str] = []
    minute = timedelta(minutes=1)

    def join(rank: int) -> None:
        found.append(agree_on_round(store, rank, world_size, minute))

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(world_size))]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(found) == world_size
    return set(found)


def test_each_start_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    store.set("hello/1", "of a process that died before it was answered")
    first, second, third = meet(store, 3), meet(store, 3), meet(store, 2)
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3


def test_machines_that_do_not_start_again_are_not_waited_for_for_ever() -> None:
    store = dist.HashStore()
    meet(store, 2)
    with pytest.raises(ValueError, match=r"rank 1 did not come.*--rdzv-backend c10d"):
        agree_on_round(store, 0, 2, timedelta(seconds=0.3))
    with pytest.raises(ValueError, match="the first rank did not come"):
        agree_on_round(store, 1, 2, timedelta(seconds=0.3))
