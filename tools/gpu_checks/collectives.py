"""The collectives that training uses, each with a known result, then timed; a program for torchrun.

Its argument is `cuda` or `cpu`. Prints a line for each, fields separated by tabs: collective, name, MiB a rank,
milliseconds, GB/s (bytes of a rank's tensor by the time). Ends with status 1 if a result is wrong.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

_REPEATS = 5
_ELEMENTS = {"cuda": 64 * 2**20, "cpu": 2**18}


class Operation(NamedTuple):
    """A collective and what it must have done."""

    name: str
    bytes: int
    run: Callable[[], object]
    is_right: Callable[[], bool]


def operations(rank: int, size: int, elements: int, device: torch.device) -> list[Operation]:
    """All of them, on about `elements` float32 numbers a rank."""
    part = elements // size
    mine = torch.full((part * size,), float(rank + 1), device=device)
    summed, share = mine.clone(), torch.empty(part, device=device)
    gathered, exchanged, received = (torch.zeros_like(mine) for _ in range(3))
    total, nothing = size * (size + 1) / 2, torch.empty(0, device=device)
    rows = torch.arange(1, size + 1, dtype=torch.float32, device=device).repeat_interleave(part)
    before, after = (rank - 1) % size, (rank + 1) % size

    def ring() -> None:
        pair = [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, received, before)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()

    none, count = [0] * size, mine.nbytes
    found = [
        Operation("all_reduce", count, lambda: dist.all_reduce(summed), lambda: bool((summed == total).all())),
        Operation(
            "reduce_scatter", count, lambda: dist.reduce_scatter_tensor(share, mine),
            lambda: bool((share == total).all()),
        ),
        Operation(
            "all_gather", count, lambda: dist.all_gather_into_tensor(gathered, mine[:part]),
            lambda: torch.equal(gathered, rows),
        ),
        Operation(
            "all_to_all", count, lambda: dist.all_to_all_single(exchanged, mine), lambda: torch.equal(exchanged, rows)
        ),
        Operation(
            "all_to_all without rows", 0, lambda: dist.all_to_all_single(nothing, mine[:0], none, none), lambda: True
        ),
    ]  # fmt: skip
    if size > 1:
        found.append(Operation("send and receive in a ring", count, ring, lambda: bool((received == before + 1).all())))
    return found


def main(kind: str) -> int:
    """Checks and times all."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", device_id=device if kind == "cuda" else None)
    wrong = []
    for operation in operations(rank, size, _ELEMENTS[kind], device):
        operation.run()
        right = torch.tensor(float(operation.is_right()), device=device)
        dist.all_reduce(right, dist.ReduceOp.MIN)
        wrong += [] if right.item() else [operation.name]
        seconds = _seconds(operation.run, torch.cuda.synchronize if kind == "cuda" else lambda: None)
        if rank == 0:
            mib, rate = f"{operation.bytes / 2**20:.0f}", f"{operation.bytes / seconds / 1e9:.1f}"
            print("\t".join(("collective", operation.name, mib, f"{1e3 * seconds:.3f}", rate)), flush=True)
    dist.destroy_process_group()
    if wrong and rank == 0:
        print(f"error: wrong results of {', '.join(wrong)}", flush=True)
    return 1 if wrong else 0


def _seconds(action: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Of a call, in the mean."""
    synchronize()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    synchronize()
    return (time.perf_counter() - start) / _REPEATS


if __name__ == "__main__":
    if sys.argv[1:] not in (["cuda"], ["cpu"]) or "RANK" not in os.environ:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    sys.exit(main(sys.argv[1]))
