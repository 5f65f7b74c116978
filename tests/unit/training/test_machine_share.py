"""What ranks of a machine share: cores by affinity, and memory that all of them claim before one takes it."""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local
from typing import Any

import pytest
import torch
from checkpoint_testing import tiny_trainer
from model_testing import tiny_arguments

from megatron.core import collectives
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.training import machine_share
from megatron.training.environment import Environment, read_environment
from megatron.training.initialize import SharedError
from megatron.training.logs.summary import summary
from megatron.training.machine_share import MachineMemory, fair_threads, share_cores

ALL = range(16)


@pytest.mark.parametrize(
    ("own", "of_all", "threads"),
    [
        (ALL, [ALL], 16),
        (ALL, [ALL] * 4, 4),
        (ALL, [ALL] * 3, 5),
        (ALL, [ALL] * 32, 1),
        (range(4, 8), [range(4 * rank, 4 * rank + 4) for rank in range(4)], 4),  # each bound to its own
        (range(8), [range(8), range(8), range(8, 16), range(8, 16)], 4),  # two to a socket
        (range(8), [range(8), ALL], 4),
    ],
)
def test_each_core_is_shared_by_who_may_run_on_it(own: range, of_all: list[range], threads: int) -> None:
    assert fair_threads(own, of_all) == threads


@pytest.mark.parametrize(("value", "chosen"), [(None, False), ("1", False), ("4", True), ("4,2", True)])
def test_torchruns_single_thread_is_no_choice(value: str | None, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert read_environment().sets_threads == chosen


FREE = {0: 1000, 1: 900, 2: 5000}


class _Job:
    """Three ranks as threads; 0 and 1 are a machine, 2 is another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[Any] = [None] * 3
        self.together = Barrier(3)
        self.rank = local()
        self.threads: dict[int, int] = {}
        monkeypatch.setattr(collectives, "all_gather_object", self._gather)
        monkeypatch.setattr(machine_share, "available_memory", lambda: FREE[self.rank.number])
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: self.threads.update({self.rank.number: n}))

    def _gather(self, values: list[Any], mine: Any, group: None) -> None:
        self.values[self.rank.number] = mine
        self.together.wait()
        values[:] = self.values
        self.together.wait()

    def run(self, action: Callable[[ProcessGroups, Environment], object]) -> list[str]:
        """What each rank is told."""

        def on(rank: int) -> str:
            self.rank.number = rank
            everybody = Group(tuple(range(3)), rank)
            environment = Environment(rank, 3, rank % 2, 2 if rank < 2 else 1, machines=2, sets_threads=rank == 1)
            try:
                action(ProcessGroups(world=everybody, control=everybody), environment)
            except SharedError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(on, range(3)))


def test_all_ranks_hear_of_the_machine_with_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine has 900 bytes for two ranks."""
    job = _Job(monkeypatch)

    def claim(size: int, keeps_copies: bool) -> list[str]:
        return job.run(lambda groups, environment: MachineMemory(groups, environment, keeps_copies).claim(size))

    assert claim(450, False) == claim(225, True) == ["", "", ""]
    refused, refused_twice = claim(451, False), claim(226, True)
    for told in (refused, refused_twice):
        assert "for the 2 ranks of a machine" in told[0] and told == told[:1] * 3
    assert "without --async-save" in refused_twice[0] and "without --async-save" not in refused[0]


def test_threads_are_set_where_nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    job = _Job(monkeypatch)
    assert job.run(share_cores) == ["", "", ""]
    assert job.threads == {0: 2, 2: 4}


def test_the_run_says_where_the_state_is() -> None:
    whole, half = (
        summary(tiny_trainer(tiny_arguments("bfloat16", settings)))
        for settings in ({}, {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5})
    )
    assert half.startswith(whole) and "optimizer" not in whole
    last = half.removeprefix(whole).strip()
    assert re.fullmatch(r"optimizer on the first rank: 0\.00 GiB on the device, 0\.00 GiB in .* by \d+ thread.*", last)
