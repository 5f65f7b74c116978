"""The memory of a run's phases, from these themselves on tensors without values, and what the libraries add to it.

Model, buffers, optimizer, schedule and messages are the real ones, so that what is alive at once is not modelled but
happens. What depends on values, the number of tokens of each expert, is taken to be even. What NCCL, CUDA and torch's
allocator take besides is estimated by a rule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.core.microbatch import Microbatch
from megatron.core.models.common import ModelStage
from megatron.core.parallel_state import CHANNEL_CTAS, Group, ProcessGroups
from megatron.core.pipeline_parallel.schedules import Pipeline
from megatron.core.transformer.moe.exchange import gather_counts
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training.checkpoints.formats import SAVED_FORMATS
from megatron.training.config import Arguments
from megatron.training.live_memory import LiveMemory
from megatron.training.loader import Batch
from megatron.training.logs.averages import MicrobatchResult, average_over_ranks
from megatron.training.microbatches import run_microbatches, sum_of_losses
from megatron.training.setup import Trainer

MIB, GIB = 2**20, 2**30
COLLECTIVE = 0.7 * GIB
"""Buffers of a communicator that reduces or gathers; 0.5 to 0.7 GiB are reported between GPUs joined by NVLink."""
NCCL_CHANNELS, RECEIVED, SENT = 32, 10 * MIB, 2 * MIB
"""Of a communicator that passes messages: its channels, and the buffers of all protocols of one, for each peer."""
CONTEXT = 0.7 * GIB
"""CUDA's context with the code of all kernels."""
WORKSPACES = 64 * MIB
"""cuBLAS: 32 MiB for each thread that multiplies, which are the main one and that of the backward pass."""
FRAGMENTATION = 0.3
"""What torch's allocator holds and cannot use, as a part of what comes and goes in a step."""


@dataclass(frozen=True, kw_only=True)
class LibraryMemory:
    """Estimated bytes on a GPU that are no tensors, by a rule that no measurement has confirmed."""

    nccl: int
    """Communicators of the groups that talk."""
    cuda: int
    """Context and workspaces."""
    fragmentation: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.nccl + self.cuda + self.fragmentation


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """Bytes of tensors alive on the device of a rank."""

    state: int
    """Weights, gradients and the optimizer's state, between all phases."""
    peaks: dict[str, int]
    """The most at any moment of each phase of a run: build, load, step, evaluation and save."""
    kept: tuple[int, ...]
    """Of one microbatch in each chunk of layers, between its forward and its backward pass."""

    @property
    def peak(self) -> int:
        """The most at any moment of a run."""
        return max(self.peaks.values())


def spread_evenly(trainer: Trainer) -> None:
    """Makes every expert be sent the same number of tokens, and none be dropped but by a capacity below that."""
    model = trainer.arguments.model
    sharers = trainer.groups.cp.size * (trainer.groups.tp.size if trainer.model.sequence_parallel else 1)
    tokens = trainer.arguments.training.micro_batch_size * trainer.arguments.data.seq_length // sharers
    pairs = int(tokens * model.moe_router_topk * min(1.0, model.moe_expert_capacity_factor or 1.0))
    share = [(pairs + expert) // model.num_experts for expert in range(model.num_experts)]

    def gather_even(counts: Tensor, group: Group) -> Tensor:
        ranks = len(gather_counts(counts, group))
        before = [tokens] * (counts.shape[0] - model.num_experts)  # some dispatchers send the number of tokens too
        return torch.tensor([before + share] * ranks)

    for module in trainer.model.modules():
        if isinstance(module, MoELayer):
            module.dispatcher.gather_counts = gather_even


def batches_without_values(arguments: Arguments, device: torch.device) -> Iterator[Batch]:
    """Microbatches as the loader brings them, without end; a sample is one document."""
    samples, length = arguments.training.micro_batch_size, arguments.data.seq_length
    while True:
        tokens, labels = (torch.zeros(samples, length, dtype=torch.int64, device=device) for _ in range(2))
        batch = {"tokens": tokens, "labels": labels, "loss_mask": torch.zeros(samples, length, device=device)}
        if arguments.data.reset_position_ids:
            batch["position_ids"] = torch.zeros_like(tokens)
        if arguments.data.reset_attention_mask:
            batch["document_bounds"] = torch.arange(samples + 1, dtype=torch.int32) * length
        yield batch


def enough_microbatches(pipeline: Pipeline, rank: int, microbatches: int) -> int:
    """The fewest microbatches of a step, up to `microbatches`, in which as much is alive at once as in all of them."""
    unit = pipeline.ranks if pipeline.chunks > 1 else 1
    most = pipeline.peak_live(rank, microbatches)
    fewest = next(n for n in range(unit, microbatches + 1, unit) if pipeline.peak_live(rank, n) == most)
    return min(microbatches, fewest + unit)  # one more, which begins while the others are still alive


def rehearse(trainer: Trainer, memory: LiveMemory) -> RunMemory:
    """Runs what a run does on the device, each as short as shows its peak; the trainer is of no use afterwards.

    `memory` is active, and was when the trainer was built. A checkpoint is read in pieces in the host's memory and
    copied to where it belongs; so loading is what happens after that.
    """
    spread_evenly(trainer)
    state, kept = memory.live, [0] * len(trainer.model)
    optimizer, checkpoint = trainer.optimizer, trainer.arguments.checkpoint
    phases: dict[str, Callable[[], object]] = {
        "load": lambda: optimizer.finish_loading(optimizer.scalars()),
        "step": lambda: _step(trainer, memory, kept),
        "evaluation": lambda: evaluate_without_values(trainer),
        "save": lambda: None if checkpoint.no_save_optim else SAVED_FORMATS[checkpoint.ckpt_format].rehearse(optimizer),
    }
    peaks = {"build": memory.peak}
    for name, phase in phases.items():
        memory.peak = memory.live
        phase()
        peaks[name] = memory.peak
    return RunMemory(state=state, peaks=peaks, kept=tuple(kept))


def _microbatches(trainer: Trainer) -> int:
    return enough_microbatches(trainer.pipeline, trainer.groups.pp.rank, trainer.num_microbatches)


def _step(trainer: Trainer, memory: LiveMemory, kept: list[int]) -> None:
    """A step of training; writes to `kept` what stays of a microbatch in each chunk."""
    chunks, number = list(trainer.model), _microbatches(trainer)

    def watched(
        model: ModelStage, batch: Batch | None, hidden: Tensor | None, microbatch: Microbatch
    ) -> tuple[Tensor, MicrobatchResult]:
        before = memory.live
        result = trainer.forward_step(model, batch, hidden, microbatch)
        kept[chunks.index(model)] = memory.live - before
        return result

    trainer.buffers.start_step(number)
    source = batches_without_values(trainer.arguments, trainer.device)
    scale = trainer.optimizer.scaler.scale
    results = run_microbatches(replace(trainer, forward_step=watched), source, number, loss_scale=scale)
    trainer.buffers.finalize()
    trainer.optimizer.step(trainer.schedule.rates(0), sum_of_losses(results))
    average_over_ranks(results, number, trainer.groups, trainer.arguments.model, trainer.device)
    trainer.buffers.wait_for_parameters()


def evaluate_without_values(trainer: Trainer) -> None:
    """A global batch of an evaluation, or as much of it as is alive at once."""
    source, number = batches_without_values(trainer.arguments, trainer.device), _microbatches(trainer)
    trainer.model.eval()
    results = run_microbatches(trainer, source, number, forward_only=True)
    average_over_ranks(results, number, trainer.groups, trainer.arguments.model, trainer.device)
    trainer.model.train()


def library_memory(groups: ProcessGroups, dispatcher: str, moving: int) -> LibraryMemory:
    """What comes on top of the tensors of a rank with these groups.

    Args:
        groups: of the rank.
        dispatcher: --moe-token-dispatcher-type.
        moving: bytes that come and go, `peak - state` of the memory of a run.
    """
    dense = (groups.world, groups.tp, groups.tp_cp, groups.cp)
    collectives = {group.ranks for group in (*dense, groups.ep_etp, groups.etp) if group.size > 1}
    # gradients are reduced on communicators of their own
    replicas = {group.ranks for group in (groups.dp_cp, groups.edp) if group.size > 1}
    channels = groups.pp_channels
    sources = [channel for channel in (channels.forward_in, channels.backward_in) if channel.size > 1]
    targets = [channel for channel in (channels.forward_out, channels.backward_out) if channel.size > 1]
    peers = min(groups.cp.size - 1, 1)  # the ring's
    if groups.ep.size > 1:
        peers += (groups.ep if dispatcher == "alltoall" else groups.ep_etp).size - 1
    nccl = COLLECTIVE * (len(collectives) + len(replicas)) + NCCL_CHANNELS * peers * (RECEIVED + SENT)
    nccl += CHANNEL_CTAS * (RECEIVED * len(sources) + SENT * len(targets))
    return LibraryMemory(nccl=int(nccl), cuda=int(CONTEXT + WORKSPACES), fragmentation=int(FRAGMENTATION * moving))
