"""One rank of a job of any size, built in one process without a device: shapes, parameters, and memory.

Tensors are on torch's meta device, which knows shapes and types but holds no values, and the process groups are of
torch's fake backend, whose collectives return at once. The model, its buffers, its optimizer and the step that is run
for its memory (`memory_model`) are the real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.core.config import ParallelConfig
from megatron.core.models.common import ModelStage
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.stages import Stage
from megatron.training.config import Arguments
from megatron.training.live_memory import HostWithoutValues, LiveMemory
from megatron.training.memory_model import LibraryMemory, library_memory, rehearse
from megatron.training.setup import ForwardStep, ModelProvider, Trainer, build_trainer

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class ChunkReport:
    """One stage on the rank."""

    stage: Stage
    parameters: int
    """Elements on this rank."""
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    """Of what goes to the next stage; () for the loss."""
    activation_bytes: int
    """What stays of one microbatch until its backward pass."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What is known of a rank before it runs; bytes unless said otherwise."""

    groups: ProcessGroups
    chunks: tuple[ChunkReport, ...]
    model: str
    """What it is called."""
    model_parameters: int
    """Of the whole model, each once, without the padding of the vocabulary."""
    weights: int
    gradients: int
    optimizer: int
    """The optimizer's state on the device."""
    host: int
    """What --optimizer-cpu-offload keeps in the host's memory, with the optimizer that the flags ask for."""
    sharded_optimizer: int
    """The optimizer's state with --use-distributed-optimizer."""
    activations: int
    """What a run has alive besides these at its peak: activations, temporary tensors and messages."""
    live: int
    """The most chunks' microbatches that are alive at once."""
    microbatches: int
    peaks: dict[str, int]
    """The most bytes of tensors alive at once in each phase of a run, with the optimizer that the flags ask for."""
    libraries: LibraryMemory
    """Estimated, on top of all tensors."""

    chosen_optimizer: int
    """The optimizer's state as the flags say."""

    @property
    def peak(self) -> int:
        """The most bytes of tensors alive at once."""
        return max(self.peaks.values())

    @property
    def needed(self) -> int:
        """Tensors and libraries."""
        return self.peak + self.libraries.total


class StateMemory(NamedTuple):
    """Bytes of what lasts as long as the run: weights, gradients and the optimizer's state."""

    live: int
    peak: int
    """The most while they were made."""


def dry_run(arguments: Arguments, model_provider: ModelProvider, forward_step: ForwardStep) -> DryRun:
    """Builds the rank that --dry-run names. Raises ValueError if the layout, the batch or the model do not fit."""
    rank, world_size = parse_rank(arguments.training.dry_run or "")
    with _fake_job(arguments.parallel, rank, world_size) as groups:

        def build(distributed: bool) -> Trainer:
            gathers = distributed and arguments.parallel.overlap_param_gather
            parallel = replace(arguments.parallel, use_distributed_optimizer=distributed, overlap_param_gather=gathers)
            return _build(replace(arguments, parallel=parallel), groups, model_provider, forward_step, memory)

        distributed = arguments.parallel.use_distributed_optimizer
        with LiveMemory(META.type) as memory:
            trainer = build(distributed)
            run = rehearse(trainer, memory)
        optimizer, sharded = (
            (trainer if either == distributed else build(either)).optimizer.device_bytes for either in (False, True)
        )
        return DryRun(
            groups=groups,
            chunks=tuple(_report(trainer, *chunk) for chunk in zip(trainer.model, run.kept, strict=True)),
            model=trainer.model.first.kind,
            model_parameters=trainer.model.first.table.elements,
            weights=sum(bucket.weights.nbytes for bucket in trainer.buffers.buckets),
            gradients=sum(bucket.grads.nbytes for bucket in trainer.buffers.buckets),
            optimizer=optimizer,
            host=trainer.optimizer.host_bytes,
            sharded_optimizer=sharded,
            chosen_optimizer=sharded if distributed else optimizer,
            activations=run.peak - run.state,
            live=trainer.pipeline.peak_live(groups.pp.rank, trainer.num_microbatches),
            microbatches=trainer.num_microbatches,
            peaks=run.peaks,
            libraries=library_memory(groups, arguments.model.moe_token_dispatcher_type, run.peak - run.state),
        )


def state_memory(arguments: Arguments, model_provider: ModelProvider, forward_step: ForwardStep) -> StateMemory:
    """Builds the rank that --dry-run names, which takes a tenth of a second. Raises ValueError as `dry_run` does."""
    rank, world_size = parse_rank(arguments.training.dry_run or "")
    with _fake_job(arguments.parallel, rank, world_size) as groups, LiveMemory(META.type) as memory:
        trainer = _build(arguments, groups, model_provider, forward_step, memory)
        state = StateMemory(memory.live, memory.peak)
        del trainer
    return state


def _build(
    arguments: Arguments,
    groups: ProcessGroups,
    model_provider: ModelProvider,
    forward_step: ForwardStep,
    memory: LiveMemory,
) -> Trainer:
    host = HostWithoutValues(memory)
    return build_trainer(arguments, groups, META, model_provider, forward_step, initialize=False, memory=host)


def representative_ranks(arguments: Arguments) -> list[int]:
    """The rank that --dry-run names and the others that may need more memory than it.

    Ranks of a stage need the same. Of stages that hold the same, an earlier one has more microbatches alive.
    """
    rank, world_size = parse_rank(arguments.training.dry_run or "")
    stages = arguments.parallel.stages(arguments.model.num_layers)
    ranks_of_a_stage = world_size // len(stages)
    first: dict[tuple[object, ...], int] = {}
    for number, chunks in enumerate(stages):
        held = tuple((len(chunk.layers), chunk.has_embedding, chunk.has_output) for chunk in chunks)
        first.setdefault(held, number)
    others = {number * ranks_of_a_stage + rank % ranks_of_a_stage for number in first.values()}
    return [rank, *sorted(others - {rank})]


def parse_rank(text: str) -> tuple[int, int]:
    """Rank and number of ranks from RANK/WORLD. Raises ValueError if it is no such thing."""
    rank, slash, world = text.partition("/")
    if not (slash and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"--dry-run takes RANK/WORLD, a rank from 0 and the number of ranks, such as 5/16; got {text!r}"
        )
    return int(rank), int(world)


@contextmanager
def _fake_job(parallel: ParallelConfig, rank: int, world_size: int) -> Iterator[ProcessGroups]:
    """The groups of one rank of a job whose other ranks do not exist."""
    # the fake backend is torch's own means for this, but lives among its test tools
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # messages between two ranks look for the backend of the tensor's device; named so, torch prints a warning
    backend = "fake" if parallel.context_parallel_size == 1 else "meta:fake"
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield build_process_groups(parallel, rank, world_size, control_backend=backend)
    finally:
        dist.destroy_process_group()


def _report(trainer: Trainer, chunk: ModelStage, kept: int) -> ChunkReport:
    tokens = (trainer.arguments.training.micro_batch_size, trainer.arguments.data.seq_length)
    return ChunkReport(
        stage=chunk.stage,
        parameters=sum(parameter.numel() for parameter in chunk.parameters()),
        input_shape=tokens if chunk.stage.has_embedding else trainer.link.shape,
        output_shape=() if chunk.stage.has_output else trainer.link.shape,
        activation_bytes=kept,
    )
