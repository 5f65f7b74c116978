"""Trainers of the tiny model that save and load, and the comparison of what they saved."""

import resource
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_testing import step_batches, tiny_arguments
from torch import Tensor

import pretrain_gpt
from megatron.core.dist_checkpointing import CheckpointReader
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.training.checkpoints.saver import CheckpointSaver
from megatron.training.checkpoints.source import load_checkpoint, locate_checkpoint
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.progress import Progress, RunRecord
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step


def checkpoint_arguments(**checkpoint: Any) -> Arguments:
    """Settings of a tiny run in bfloat16 with these checkpoint settings."""
    return replace(tiny_arguments("bfloat16"), checkpoint=CheckpointConfig(**checkpoint))


def tiny_trainer(arguments: Arguments, groups: ProcessGroups | None = None) -> Trainer:
    """The tiny model, freshly drawn."""
    return build_trainer(
        arguments,
        groups or ProcessGroups(),
        torch.device("cpu"),
        pretrain_gpt.model_provider,
        pretrain_gpt.forward_step,
    )


def train(trainer: Trainer, progress: Progress, steps: int) -> list[float]:
    """Takes some steps on the batches that come next; returns their losses."""
    losses = []
    for _ in range(steps):
        dp = trainer.groups.dp
        record, _ = train_step(trainer, iter(step_batches(progress.iteration, dp.rank, dp.size)), progress)
        losses.append(record.averages.lm_loss)
    trainer.buffers.wait_for_parameters()
    return losses


def load(trainer: Trainer) -> tuple[Progress, str]:
    """Loads what the trainer's arguments say."""
    source = locate_checkpoint(trainer.arguments, trainer.groups)
    progress, _, remark = load_checkpoint(source, trainer)
    return progress, remark


def save(trainer: Trainer, progress: Progress, record: RunRecord | None = None) -> None:
    """Saves to the folder of the trainer's arguments, and waits until the step is in its place."""
    saver = CheckpointSaver(trainer, record or RunRecord())
    saver.save(progress)
    saver.finish()


def state_of(trainer: Trainer) -> list[Tensor]:
    """Copies of the rank's weights, masters and moments."""
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    return weights + [tensor.clone() for piece in trainer.optimizer.state_pieces() for tensor in piece.tensors.values()]


def assert_same_tensors(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Both hold the same values, bit for bit."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def train_and_save(
    rank: int, world_size: int, settings: Mapping[str, Any], params_dtype: str, load_from: str, save_to: str
) -> list[float]:
    """A run of three steps, or the continuation of one from `load_from`, then saving, two more steps, saving."""
    checkpoint = {"save": save_to, "load": load_from or None, "ckpt_format": "sharded"}
    arguments = tiny_arguments(params_dtype, {**settings, **checkpoint})
    groups = build_process_groups(arguments.parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    trainer = tiny_trainer(arguments, groups)
    if load_from:
        progress, _ = load(trainer)
    else:
        progress = Progress()
        train(trainer, progress, 3)
    assert progress.iteration == 3 and progress.consumed_samples == 24
    save(trainer, progress)
    losses = train(trainer, progress, 2)
    save(trainer, progress)
    return losses


def saved_tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a step by kind and name, random states left out."""
    with CheckpointReader(folder) as reader:
        reader.verify()
        return {
            (kind, name): reader.read(name, kind) for kind, name in reader.metadata.tensors if kind != "rng"
        }  # fmt: skip


def refusals(rank: int, world_size: int, folder: str) -> list[str]:
    """What each of two ranks is told: the second one's disk is full, then its file is cut, then the metadata."""
    arguments = tiny_arguments("bfloat16", {"save": folder, "load": folder, "ckpt_format": "sharded"})
    groups = build_process_groups(arguments.parallel, rank, world_size)
    trainer, progress, told = tiny_trainer(arguments, groups), Progress(iteration=1), []
    save(trainer, progress)
    before = state_of(trainer)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    try:
        save(trainer, replace(progress, iteration=2))
    except ValueError as error:
        told.append(str(error))
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for name in ("rank_00001.safetensors", "sharded.json"):
        file = Path(folder) / "iter_0000001" / name
        torch.distributed.barrier()
        if rank == 1:
            file.write_bytes(file.read_bytes()[:-3])
        torch.distributed.barrier()
        try:
            load(trainer)
        except ValueError as error:
            told.append(str(error))
    assert_same_tensors(state_of(trainer), before)
    return told
