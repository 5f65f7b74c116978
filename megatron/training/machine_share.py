"""What the ranks of a machine share when the optimizer works on the host: its memory and its cores."""

import os
from collections.abc import Iterable
from typing import Any

import torch

from megatron.core import collectives
from megatron.core.host_memory import HostMemory, available_memory, too_much
from megatron.core.parallel_state import ProcessGroups
from megatron.training.environment import Environment
from megatron.training.initialize import SharedError


class MachineMemory(HostMemory):
    """Memory that the ranks of a machine claim together.

    With `keeps_copies`, what is kept is copied within the host's memory as well, for --async-save.
    """

    def __init__(self, groups: ProcessGroups, environment: Environment, keeps_copies: bool = False) -> None:
        self._groups, self._environment, self._keeps_copies = groups, environment, keeps_copies

    def claim(self, size: int) -> None:
        """See `HostMemory`; collective over the job. Raises SharedError on every rank if one machine has too little."""
        size *= 2 if self._keeps_copies else 1
        # no rank takes anything before all have looked
        for ranks in _by_machine((size, available_memory()), self._groups, self._environment):
            wanted = sum(size for size, _ in ranks)
            free = min((free for _, free in ranks if free is not None), default=wanted)
            if wanted > free:
                copies = "; without --async-save, which keeps a copy, half of it does" if self._keeps_copies else ""
                raise SharedError(too_much(wanted, free, len(ranks)) + copies)


def share_cores(groups: ProcessGroups, environment: Environment) -> None:
    """Gives this rank's updates as many threads as there are cores for each rank of the machine; collective.

    A number that somebody has chosen is left as it is.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    for ranks in _by_machine((environment.rank, sorted(cores)), groups, environment):
        if environment.rank in (rank for rank, _ in ranks) and not environment.sets_threads:
            torch.set_num_threads(fair_threads(cores, [cores for _, cores in ranks]))


def fair_threads(own: Iterable[int], of_all: Iterable[Iterable[int]]) -> int:
    """Threads of a rank that may run on the cores `own`, where each core is shared by all ranks that may run on it."""
    users: dict[int, int] = {}
    for cores in of_all:
        for core in cores:
            users[core] = users.get(core, 0) + 1
    return max(1, int(sum(1 / users[core] for core in own) + 1e-6))


def _by_machine(value: Any, groups: ProcessGroups, environment: Environment) -> list[list[Any]]:
    """Every rank's value, those of a machine together; on every rank, collective."""
    mine = (environment.rank - environment.local_rank, value)
    values: list[Any] = [mine]
    if groups.control.size > 1:
        values = [None] * groups.control.size
        collectives.all_gather_object(values, mine, group=groups.control.handle)
    machines: dict[int, list[Any]] = {}
    for machine, each in values:
        machines.setdefault(machine, []).append(each)
    return list(machines.values())
