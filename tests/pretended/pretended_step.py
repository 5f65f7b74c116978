"""Training steps of one rank on the pretended device: what was seen of them, and the dry run's word on their memory."""

import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from memory_testing import PhaseCounter, count_phases, problems
from planted import PLANTED
from pretended_gpu import DEVICE, PretendedGPU, pretended_gpu
from torch.testing._internal.distributed.fake_pg import FakeStore

import pretrain_gpt
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.training.arguments import parse_arguments
from megatron.training.config import Arguments
from megatron.training.dry_run import dry_run, parse_rank
from megatron.training.dry_run_report import libraries_line
from megatron.training.memory_model import batches_without_values, evaluate_without_values, spread_evenly
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step

STEPS = 2
"""The second is watched: what lasts from the first on is there by then."""
_GIB = 2**30


class Job(NamedTuple):
    """A rank to be watched."""

    flags: list[str]
    """Of pretrain_gpt.py, with --dry-run RANK/WORLD."""
    plant: str | None = None
    """A fault of `planted` to be put in."""
    phases: bool = False
    """Whether the phases of a run are watched instead of one step; for one process."""


@dataclass(kw_only=True)
class Seen:
    """What the watched step showed; memory in bytes."""

    rank: str
    state: int
    """Alive before the step."""
    peak: int
    """Alive at most in the step."""
    predicted: int
    """The same by the dry run."""
    libraries: str
    """What the dry run adds for the libraries."""
    waits: dict[str, int]
    """How often the host waits for the device in the step, by kind and place."""
    unmarked: list[str]
    """Those that `megatron.core.waiting` does not know of."""
    collectives: dict[str, int]
    launches: dict[str, int]
    copies: dict[str, int]
    """Bytes between host and device that the host does not wait for."""
    seconds: float


def watch_step(flags: list[str]) -> Seen:
    """Runs it. Raises ValueError for flags that the job would refuse, AssertionError for what a GPU would not take."""
    start = time.perf_counter()
    arguments, _ = parse_arguments(flags)
    rank, world_size = parse_rank(arguments.training.dry_run or "")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        groups = build_process_groups(arguments.parallel, rank, world_size, control_backend="fake")
        with pretended_gpu() as gpu:
            state = _run(arguments, groups, gpu)
    finally:
        dist.destroy_process_group()
    predicted = dry_run(arguments, pretrain_gpt.model_provider, pretrain_gpt.forward_step)
    return Seen(
        rank=f"{rank} of {world_size}",
        state=state,
        peak=gpu.peak,
        predicted=predicted.peaks["step"],
        libraries=libraries_line(predicted.libraries),
        waits={f"{wait.kind}: {wait.place}": count for wait, count in sorted(gpu.waits.items())},
        unmarked=[f"{wait.kind}: {wait.place}" for wait in sorted(gpu.unmarked)],
        collectives=dict(sorted(gpu.collectives.items())),
        launches=dict(sorted(gpu.launches.items())),
        copies=dict(sorted(gpu.copies.items())),
        seconds=time.perf_counter() - start,
    )


def _run(arguments: Arguments, groups: ProcessGroups, gpu: PretendedGPU) -> int:
    """The steps, of which `gpu` remembers the last, and an evaluation; returns the bytes alive before them."""
    trainer = build_trainer(
        arguments, groups, DEVICE, pretrain_gpt.model_provider, pretrain_gpt.forward_step, initialize=False
    )
    spread_evenly(trainer)
    evaluate_without_values(trainer)
    source, state, progress = batches_without_values(arguments, DEVICE), gpu.live, Progress()
    for step in range(STEPS):
        print(f"step {step + 1} of {STEPS}", file=sys.stderr, flush=True)
        gpu.start()
        train_step(trainer, source, progress)
    return state


def watch_phases(flags: list[str]) -> list[str]:
    """All phases of a run, with each way to save: those that take other memory than the dry run says."""
    arguments, _ = parse_arguments(flags)
    with pretended_gpu() as gpu, tempfile.TemporaryDirectory() as folder:
        counter = PhaseCounter(arguments, ProcessGroups(), DEVICE, gpu)
        formats = ("sharded", False), ("sharded", True), ("torch", False)
        counted = count_phases(counter, lambda: batches_without_values(arguments, DEVICE), Path(folder), formats)
    return problems(counted, dry_run(arguments, pretrain_gpt.model_provider, pretrain_gpt.forward_step))


def run_jobs(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was seen of each, or under `error` what ended it."""
    results = {}
    for name, job in jobs.items():
        flags, plant, phases = Job(**job)
        try:
            with PLANTED[plant]() if plant else nullcontext():
                results[name] = {"problems": watch_phases(flags)} if phases else asdict(watch_step(flags))
        except Exception as error:  # what a planted fault leads to is part of the result
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def report(seen: Seen) -> str:
    """The same as text."""

    def rows(title: str, counts: dict[str, int]) -> list[str]:
        return [f"{title}:", *(f"{count:8,}  {name}" for name, count in counts.items())] if counts else []

    error = seen.predicted / seen.peak - 1
    return "\n".join(
        (
            f"pretended step of rank {seen.rank}: no mix-up of devices, {seen.seconds:.0f} s",
            f"memory: {seen.state / _GIB:.2f} GiB before the step, {seen.peak / _GIB:.2f} GiB at its peak; the dry run "
            f"says {seen.predicted / _GIB:.2f} GiB ({error:+.2%})",
            seen.libraries,
            *rows("the host waits in a step", seen.waits),
            *rows("operations of torch.distributed in a step", seen.collectives),
            *rows("launches of Triton's kernels in a step", seen.launches),
            *rows("bytes copied while the host goes on", seen.copies),
        )
    )
