"""The group for messages while ranks wait: connected within the run's timeout, patient afterwards."""

import os
from datetime import timedelta

import torch
from distributed_testing import run_distributed

from megatron.core.config import ParallelConfig
from megatron.core.parallel_state import CONTROL_TIMEOUT, build_process_groups, connect_control
from megatron.training.initialize import on_first, together

TP2 = ParallelConfig(tensor_model_parallel_size=2)


def _timeouts_and_error(rank: int, world_size: int) -> tuple[list[timedelta], str, str]:
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as on GPUs
    short = timedelta(seconds=40)
    groups = build_process_groups(TP2, rank, world_size, short)
    control = groups.control.handle
    assert control is not None
    timeouts = [control._get_backend(torch.device("cpu")).options._timeout]
    connect_control(groups.control)
    timeouts.append(control._get_backend(torch.device("cpu")).options._timeout)
    together(lambda: None, groups)
    said = on_first(lambda: f"from {rank}", groups)

    # the same where the other rank does not come
    alone = build_process_groups(TP2, rank, world_size, timedelta(seconds=1)).control
    error = ""
    if rank == 0:
        try:
            connect_control(alone)
        except ValueError as raised:
            error = str(raised)
    together(lambda: None, groups)  # no rank leaves while the other still waits
    return timeouts, said, error


def test_patience_begins_when_all_are_connected() -> None:
    first, second = run_distributed(_timeouts_and_error, 2)
    for timeouts, said, _ in (first, second):
        assert timeouts == [timedelta(seconds=40), CONTROL_TIMEOUT] and said == "from 0"
    assert "\n" not in first[2] and "set GLOO_SOCKET_IFNAME" in first[2] and not second[2]
