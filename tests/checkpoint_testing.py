"""Trainers of the tiny model that save and load, and the comparison of what they saved."""

import argparse
import resource
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from model_testing import TINY_MODEL, step_batches, tiny_arguments
from torch import Tensor
from torch_dist_testing import FUSED_NORM, Pieces, pieces_of_model, save_torch_dist

import pretrain_gpt
from megatron.core.dist_checkpointing import CheckpointReader
from megatron.core.interchange.torch_archive import Window
from megatron.core.interchange.torch_dist import CheckpointFolder
from megatron.core.interchange.torch_file import archive_records
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
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


def save_as_megatron(
    step: Path,
    folder: Path,
    *,
    masters: str | None = "param",
    bound: bool = False,
    chained: bool = False,
    tp: int = 2,
    norms: Mapping[str, str] = FUSED_NORM,
    prefix: str = "",
    per_layer: bool = False,
    whole: bool = False,
    args: Mapping[str, Any] | None = None,
    extra: Mapping[str, Pieces] | None = None,
    **more: Any,
) -> None:
    """What a step of ours holds as a torch_dist folder of Megatron-LM, saved by `tp` ranks.

    Masters have the key `masters`; there is no state of the optimizer without it, or one `bound` to a layout. `more` is
    for `save_torch_dist`.
    """
    saved = saved_tensors(step)
    padded = TINY_MODEL.padded_vocab_size(tp)
    rules = list(mixtral_weights(TINY_MODEL, padded))

    def pieces(kind: str) -> dict[str, Pieces]:
        def read(rule: WeightRule) -> Tensor:
            tensor = saved[kind, rule.name]
            return torch.cat([tensor, tensor.new_full((rule.shape[0] - len(tensor), *tensor.shape[1:]), 9.0)])

        return pieces_of_model(rules, read, tp=tp, norms=norms, prefix=prefix, per_layer=per_layer, whole=whole)

    tensors, objects = pieces("weight"), {"rng_state/shard_0_1": [1]}
    if bound:
        place = "chained_0.optimizer.distributed.dp_group_idx_0"
        objects[f"{place}.optimizer/shard_0_1"] = [{"param_groups": [{"step": 3}]}]
        tensors[f"{place}.gbuf_idx_0.dtype_0.bucket_idx_0.exp_avg"] = [((0,), torch.zeros(8))]
    elif masters is not None:
        for kind, name in {"master": masters, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
            for key, found in pieces(kind).items() if (kind, rules[0].name) in saved else ():
                chain = f"chained_{int('experts' in key)}." if chained else ""
                tensors[f"{chain}optimizer.state.{name}.{key}"] = found
    with CheckpointReader(step) as reader:
        progress, own = reader.state["progress"], dict(reader.arguments)
    own |= {"vocab_size": None, "padded_vocab_size": padded, "tensor_model_parallel_size": tp, **(args or {})}
    own["attention_backend"] = Path  # of a class that is not plain
    common = {
        "iteration": progress["iteration"],
        "opt_param_scheduler": {"num_steps": progress["scheduled_samples"]},
        "optimizer": {0: {"optimizer": {"param_groups": [{"step": progress["iteration"]}, {}]}}},
    }
    settings = {"objects": objects, **more, "common": common | more.get("common", {})}
    save_torch_dist(folder, tensors | dict(extra or {}), argparse.Namespace(**own), **settings)


def _refusal_of_megatron(trainer: Trainer, folder: Path) -> str:
    """What a rank is told of a folder of Megatron-LM in which the last element of its last file has changed."""
    step = folder / "megatron" / "iter_0000001"
    if trainer.groups.world.is_first:
        save_as_megatron(folder / "iter_0000001", step)
        place = max(
            chunk.place for tensor in CheckpointFolder(step).catalog.tensors.values() for chunk in tensor.chunks
        )
        start = archive_records(step / place.file, Window(place.offset, place.length))["data/0"].start
        with open(step / place.file, "r+b") as file:
            file.seek(start)
            changed = bytes([file.read(1)[0] ^ 4])
            file.seek(start)
            file.write(changed)
    torch.distributed.barrier()
    checkpoint = replace(trainer.arguments.checkpoint, load=str(step))
    try:
        load(replace(trainer, arguments=replace(trainer.arguments, checkpoint=checkpoint)))
    except ValueError as error:
        return str(error)
    return ""


def refusals(rank: int, world_size: int, folder: str) -> list[str]:
    """What each of two ranks is told: the second one's disk is full, the last bytes of a run of Megatron-LM, which it
    is to compare, have changed, then its file is cut, then the metadata."""
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
    told.append(_refusal_of_megatron(trainer, Path(folder)))
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
