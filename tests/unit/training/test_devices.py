"""Which GPU a process takes, and what it says if there is none for it or nothing can be compiled."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron.core.fusions import compiling
from megatron.training.device import check_kernels, choose_device, claim_gpu
from megatron.training.environment import Environment
from megatron.training.restarts import all_or_none


@pytest.mark.parametrize(("gpus", "expected"), [(0, "cpu"), (1, "cuda:0"), (2, None), (4, "cuda:2"), (8, "cuda:2")])
def test_a_process_takes_its_own_gpu_or_the_only_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    environment = Environment(rank=6, world_size=8, local_rank=2, local_world_size=4)
    if expected is None:
        with pytest.raises(ValueError, match=r"2 GPU\(s\) for 4 processes"):
            choose_device("auto", environment)
    else:
        assert str(choose_device("auto", environment)) == expected


@pytest.mark.parametrize("identities", ["abcd", "aaaa", "abca"])
def test_two_ranks_with_one_gpu_end_the_start_of_all(identities: str) -> None:
    """Whatever machines they are on, each rank is told, and the ranks that have the GPU are named."""
    answers = _start([lambda store, rank=rank: claim_gpu(store, rank, identities[rank]) for rank in range(4)])
    if len(set(identities)) == 4:
        assert answers == [""] * 4
    else:
        assert all(re.search(r"ranks \d and \d have the same GPU \(a\): start at most one", text) for text in answers)
        named = set(re.findall(r"\d", answers[0].partition("have")[0]))
        assert {identities[int(rank)] for rank in named} == {"a"}


@pytest.mark.parametrize(
    "error", [ValueError("no GPU here"), RuntimeError("no GPU here\nC++ stack"), OSError("no GPU here")]
)
def test_a_rank_without_a_device_ends_the_start_of_all(error: Exception) -> None:
    def fail(store: dist.Store) -> None:
        raise error

    answers = _start([lambda store: None, lambda store: None, fail])
    assert answers[2] == str(error)
    assert {text.replace("RuntimeError: ", "") for text in answers[:2]} == {"rank 2: no GPU here"}


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.3))
    with pytest.raises(ValueError, match="of 2 ranks only 1 came to the start"):
        all_or_none(lambda: None, store, 0, 2)


def _start(actions: list[Callable[[dist.Store], None]]) -> list[str]:
    """What each rank, in a thread, raises at the start; empty for none."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def rank(number: int) -> str:
        try:
            all_or_none(lambda: actions[number](store), store, number, len(actions))
        except Exception as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(rank, range(len(actions))))


def test_cuda_is_left_alone_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the driver was loaded"))
    assert choose_device("cpu", Environment(0, 1, 0, 1)).type == "cpu"


def test_a_missing_compiler_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("while compiling\nFailed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(compiling, "swiglu", fail)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    with pytest.raises(ValueError, match=r"\(Failed to find C compiler.*\): Triton needs a C compiler .*python3-dev"):
        check_kernels(torch.device("cuda", 0))
    check_kernels(torch.device("cpu"))
