"""Which GPU a process takes, and what it says if there is none for it or nothing can be compiled."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megatron.training import initialize
from megatron.training.initialize import Environment, check_kernels, check_own_gpu, choose_device


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
def test_processes_that_see_one_gpu_must_see_different_ones(identities: str) -> None:
    store = dist.HashStore()

    def check(place: int) -> str:
        try:
            check_own_gpu(store, Environment(4 + place, 8, place, 4), identities[place])
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(check, range(4)))
    assert len(answers) == 1  # all of them fail, or none
    found = len(set(identities))
    assert (answers == {""}) is (found == 4)
    assert found == 4 or f"{found} GPU(s) for 4 processes" in answers.pop()


def test_a_missing_compiler_is_reported_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("while compiling\nFailed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(initialize, "swiglu", fail)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    with pytest.raises(ValueError, match=r"\(Failed to find C compiler.*\): Triton needs a C compiler .*python3-dev"):
        check_kernels(torch.device("cuda", 0))
    check_kernels(torch.device("cpu"))
