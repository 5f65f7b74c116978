"""The sharded format (`--ckpt-format sharded`), which knows nothing of the layout: what a rank saves and loads.

Every tensor is saved once, under its name in the whole model, by one of the ranks that hold it; whoever loads reads
the parts it needs. Weights and the optimizer's state are pieces of the model's tensors, random states one row a rank.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from megatron.core import dist_checkpointing, interchange
from megatron.core.dist_checkpointing import CheckpointReader, TensorShard
from megatron.core.fusions.stored import StoredRange
from megatron.core.interchange.folder_kind import is_sharded
from megatron.core.models.common import ModelChunks
from megatron.core.optimizer.optimizer import MASTER, MixedPrecisionOptimizer
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import NamedShard, named_shards, spec_of
from megatron.training.checkpoints.protocol import CheckpointSource, LoadedState, PreparedStep, StepToSave
from megatron.training.checkpoints.random_states import random_states, set_random_states
from megatron.training.checkpoints.same_model import check_same_model, check_same_type, refuse
from megatron.training.config import Arguments
from megatron.training.initialize import together
from megatron.training.progress import Progress, RunRecord, to_saved
from megatron.training.setup import Trainer


class ShardReader(Protocol):
    """An open checkpoint."""

    def read_into(self, shard: TensorShard) -> None:
        """Fills `shard.data`, a tensor; vocabulary padding becomes zero."""


def checkpoint_shards(
    model: ModelChunks, optimizer: MixedPrecisionOptimizer | None, groups: ProcessGroups
) -> list[TensorShard]:
    """Views of this rank's weights and, with `optimizer`, of its optimizer's state; `read_shards` sets the state.

    Of the ranks that hold the same values one owns each of them, taken in turn so that all have as much to write.
    """
    owners = _Owners(groups)
    shards_of = dict(_shards_by_parameter(model))
    shards = [
        _shard("weight", shard, shard.data.view(-1), 0, owners.owns(shard, shard.data.nbytes))
        for named in shards_of.values()
        for shard in named
    ]
    for piece in optimizer.state_pieces() if optimizer is not None else ():
        for kind, stored in piece.state.items():
            if kind == MASTER and stored.dtype == piece.parameter.dtype:
                continue  # the weights are their own masters
            position = 0
            for shard in shards_of[piece.parameter]:  # the experts of a stack, or the one tensor
                size = shard.data.numel()
                start, end = max(piece.start - position, 0), min(piece.end - position, size)
                if start < end:
                    place = position + start - piece.start, position + end - piece.start
                    data = stored.data[slice(*place)] if stored.plain else StoredRange(stored, *place)
                    sharded = optimizer is not None and optimizer.buffers.sharded
                    owned = owners.owns(shard, data.numel() * data.dtype.itemsize, replicated=not sharded)
                    shards.append(_shard(kind, shard, data, start, owned))
                position += size
    return shards


def read_shards(reader: ShardReader, shards: list[TensorShard]) -> None:
    """Sets the state to what a checkpoint has; of what does not lie in memory as such, one tensor's at a time.

    All of a tensor's are set at once, since a block of numbers with one scale may lie in two experts.
    """
    for stored, members in itertools.groupby(shards, key=lambda shard: getattr(shard.data, "stored", None)):
        if stored is None:
            for shard in members:
                reader.read_into(shard)
            continue
        values = torch.empty(stored.numel(), device=stored.data.device)
        for shard in members:
            assert isinstance(shard.data, StoredRange)
            reader.read_into(replace(shard, data=values[shard.data.start : shard.data.end]))
        stored.write(values)


def _shards_by_parameter(model: ModelChunks) -> Iterator[tuple[nn.Parameter, list[NamedShard]]]:
    """Every parameter, and its tensors of the whole model in the order they lie in it."""
    for chunk in model:
        shards = named_shards(chunk, chunk.first_layer)
        for parameter in chunk.parameters():
            stacked = spec_of(parameter).is_expert
            yield parameter, list(itertools.islice(shards, parameter.shape[0] if stacked else 1))


class _Owners:
    """Shares out what several ranks hold, deciding the same on all of them."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._groups = groups
        self._load = {False: [0] * groups.dp_cp.size, True: [0] * groups.edp.size}

    def owns(self, shard: NamedShard, size: int, *, replicated: bool = True) -> bool:
        """Whether this rank saves the next `size` bytes, of which data-parallel ranks hold copies if `replicated`."""
        groups, spec = self._groups, shard.spec
        if spec.partition_dim is None and not (groups.etp if spec.is_expert else groups.tp).is_first:
            return False
        if not replicated:
            return True
        load = self._load[spec.is_expert]
        owner = load.index(min(load))
        load[owner] += size
        return owner == (groups.edp if spec.is_expert else groups.dp_cp).rank


def _shard(kind: str, shard: NamedShard, data: torch.Tensor | StoredRange, start: int, owned: bool) -> TensorShard:
    spec = shard.spec
    shape = spec.global_shape if spec.init_rows is None else (spec.init_rows, *spec.global_shape[1:])
    cut = spec.partition_dim is not None
    return TensorShard(
        kind=kind,
        name=shard.global_name,
        shape=shape,
        data=data,
        start=start,
        partition_dim=spec.partition_dim,
        stride=spec.partition_stride,
        rank=spec.group.rank if cut else 0,
        size=spec.group.size if cut else 1,
        padded_length=None if spec.init_rows is None else spec.global_shape[0],
        owned=owned,
    )


def rng_shards(groups: ProcessGroups) -> list[TensorShard]:
    """Copies of this rank's random states: a row of a table with one row a rank."""
    world = groups.world
    return [
        TensorShard(
            kind="rng",
            name=name,
            shape=(world.size, state.numel()),
            data=state,
            partition_dim=0,
            rank=world.rank,
            size=world.size,
        )
        for name, state in random_states().items()
    ]


class Sharded:
    """Steps of shards with one description of them all; its methods are those of CheckpointFormat."""

    is_mine = staticmethod(is_sharded)

    def is_complete(self, folder: Path) -> bool:
        """Whether every file that the metadata names is there, in its size."""
        return not dist_checkpointing.lacks_files(folder)

    def arguments(self, folder: Path) -> Any:
        """Those in the metadata."""
        with CheckpointReader(folder) as reader:
            return SimpleNamespace(**reader.arguments)

    def check_layout(self, arguments: Arguments) -> None:
        """Every layout can be saved."""

    def prepare(self, step: StepToSave) -> PreparedStep:
        """The shards that this rank owns; with --async-save copies of them."""
        arguments, state = vars(step.namespace), {"progress": to_saved(step.progress, step.record)}
        if step.optimizer is not None:
            state["optimizer"] = step.optimizer.scalars()
        groups = step.trainer.groups
        shards = checkpoint_shards(step.trainer.model, step.optimizer, groups) + rng_shards(groups)
        if step.trainer.arguments.checkpoint.async_save:
            shards = dist_checkpointing.snapshot(shards, step.host_memory)

        def commit(written: list[Any]) -> None:
            iteration = step.progress.iteration
            metadata = dist_checkpointing.write_metadata(
                step.folder, written, iteration=iteration, arguments=arguments, state=state
            )
            interchange.replace_step(step.root, iteration, dist_checkpointing.step_files(metadata))

        return PreparedStep(lambda: dist_checkpointing.write_shards(step.folder, groups.world.rank, shards), commit)

    def rehearse(self, optimizer: MixedPrecisionOptimizer) -> None:
        """Nothing: the state is copied to the host where it lies, a part at a time."""

    def load(self, source: CheckpointSource, trainer: Trainer) -> LoadedState:
        """Every rank reads the parts of all files that it needs; all share the comparison of checksums."""
        groups, optimizer = trainer.groups, trainer.optimizer
        shards = checkpoint_shards(trainer.model, optimizer if source.with_optimizer else None, groups)
        expected = {rule.name for rule in trainer.model.first.table.weights()}
        reader = together(lambda: _open(source, trainer.arguments, shards, expected), groups)
        with reader:
            kinds = (*sorted({shard.kind for shard in shards}), "rng")
            together(lambda: reader.verify(kinds, groups.world.rank, groups.world.size), groups)
            together(lambda: read_shards(reader, shards), groups)
            if source.with_optimizer:
                optimizer.finish_loading(reader.state["optimizer"])
            else:
                optimizer.reload_masters()
            if source.with_rng:
                together(lambda: _load_rng(reader, groups), groups)
            return LoadedState(SimpleNamespace(**reader.arguments), reader.state["progress"])


def _open(
    source: CheckpointSource, arguments: Arguments, shards: list[TensorShard], expected: set[str]
) -> CheckpointReader:
    """The checkpoint, once it is certain that it has all that is needed, for each of the weights `expected`."""
    reader = CheckpointReader(source.folder)
    stored = SimpleNamespace(**reader.arguments)
    check_same_model(source.folder, stored, arguments)
    kinds = sorted({shard.kind for shard in shards})
    state_kinds = [kind for kind in kinds if kind != "weight"]
    without_state = bool(state_kinds) and not any(reader.tensors(kind) for kind in state_kinds)
    if source.with_optimizer and ("optimizer" not in reader.state or without_state):
        raise ValueError(
            f"{source.folder} holds no optimizer state: add --no-load-optim to go on with a fresh optimizer, or "
            "--finetune to start a new run from its weights"
        )
    check_same_type(source, stored, arguments)
    unknown = sorted(reader.state["progress"].keys() - to_saved(Progress(), RunRecord()).keys())
    if unknown and not source.weights_only:
        raise ValueError(
            f"{source.folder} was saved by another version, which also kept {', '.join(unknown)}: resume it with that "
            "one, or add --finetune to start a new run from its weights"
        )
    problems = []
    for kind in kinds:
        found = reader.tensors(kind).keys()
        problems += [f"{kind} of {name} is missing" for name in sorted(expected - found)]
        problems += [f"{kind} of {name} is unexpected" for name in sorted(found - expected)]
    if not problems:
        found_problems = (
            # what the optimizer keeps is converted
            reader.mismatch(shard, same_type=source.with_optimizer and shard.kind == "weight")
            for shard in shards
        )
        problems = [text for text in found_problems if text is not None]
    refuse(source.folder, problems)
    return reader


def _load_rng(reader: CheckpointReader, groups: ProcessGroups) -> None:
    """This rank's random states; in a job of another size the first rank's, since no rank depends on its own."""
    states = {}
    for name, saved in reader.tensors("rng").items():
        ranks = saved.shape[0]
        states[name] = reader.read(name, "rng", groups.world.rank if ranks == groups.world.size else 0, ranks).view(-1)
    set_random_states(states)
