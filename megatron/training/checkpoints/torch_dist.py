"""Megatron-LM's `torch_dist` format, which is only loaded: of any layout there at any layout here.

Weights, masters and moments are read from chunks of the whole model's tensors, a bounded piece at a time. What
Megatron-LM shares out in another way (the order of the data, random states) is this run's own.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.core.dist_checkpointing import TensorShard
from megatron.core.interchange.element_types import STORED_AS, dtype_name, from_torch, to_torch
from megatron.core.interchange.folder_kind import is_torch_dist
from megatron.core.interchange.torch_dist import WEIGHT, CheckpointFolder, ModelKeys, saved_arguments, saved_run
from megatron.core.models.weight_table import WeightRule
from megatron.core.optimizer.optimizer import MASTER
from megatron.training.checkpoints.protocol import CheckpointSource, LoadedState
from megatron.training.checkpoints.same_model import check_same_model, check_same_type
from megatron.training.checkpoints.sharded import checkpoint_shards, read_shards
from megatron.training.initialize import together
from megatron.training.progress import Progress, RunRecord, to_saved
from megatron.training.setup import Trainer

_PIECE_BYTES = 1 << 24


class TorchDist:
    """Steps of Megatron-LM's distributed checkpoints; its methods are those of CheckpointFormat."""

    is_mine = staticmethod(is_torch_dist)

    def is_complete(self, folder: Path) -> bool:
        """Whether every file that the metadata names is there and what all ranks share can be read."""
        saved_arguments(CheckpointFolder(folder))
        return True

    def arguments(self, folder: Path) -> Any:
        """Those of Megatron-LM."""
        return saved_arguments(CheckpointFolder(folder))

    def load(self, source: CheckpointSource, trainer: Trainer) -> LoadedState:
        """Every rank reads the rows that it needs; all share the comparison of checksums."""
        groups, optimizer = trainer.groups, trainer.optimizer
        opened = together(lambda: _Opened(source, trainer), groups)
        shards = checkpoint_shards(trainer.model, optimizer if opened.with_optimizer else None, groups)
        together(lambda: opened.verify(groups.world.rank, groups.world.size), groups)
        together(lambda: read_shards(opened, shards), groups)
        if opened.with_optimizer:
            optimizer.finish_loading(opened.scalars)
        else:
            optimizer.reload_masters()
        return LoadedState(opened.run.arguments, to_saved(opened.progress, RunRecord()), opened.remark)


class _Opened:
    """A checkpoint, once it is certain that it has all that is needed."""

    def __init__(self, source: CheckpointSource, trainer: Trainer) -> None:
        self._source, self._trainer = source, trainer
        self._checkpoint = CheckpointFolder(source.folder)
        self._keys = ModelKeys(self._checkpoint)
        self.run = saved_run(self._checkpoint)
        check_same_model(source.folder, self.run.arguments, trainer.arguments)
        self._rules = {rule.name: self._as_saved(rule) for rule in trainer.model.first.table.weights()}
        self._check((WEIGHT,))
        self.with_optimizer = source.with_optimizer and self._has_optimizer()
        self._kinds = (WEIGHT, *(self._check_optimizer() if self.with_optimizer else ()))
        self.progress = Progress() if source.weights_only else self._progress()

    @property
    def scalars(self) -> dict[str, float]:
        """The optimizer's state that is no tensor; the loss scale is this run's own if the checkpoint has none."""
        scaler = self.run.loss_scale or self._trainer.optimizer.scaler.state()
        return {"steps_taken": self.run.optimizer_steps or 0, **scaler}

    @property
    def remark(self) -> str:
        """What was loaded and what was not."""
        loaded = "weights and optimizer (masters and moments)" if self.with_optimizer else "weights"
        position = f"sample {self.progress.consumed_samples} of the data"
        text = (
            f"loaded {loaded} that Megatron-LM saved, to go on at {position} and at {self.progress.scheduled_samples} "
            "samples of the schedule; the order of the data, the schedule's settings and random states are this run's"
        )
        if self.with_optimizer:
            return text
        if self._source.with_optimizer:
            return (
                f"{text}\nWARNING: the optimizer starts from scratch, since its state there fits the layout it was "
                "saved at only (dp_reshardable): --dist-ckpt-optim-fully-reshardable of Megatron-LM keeps it for others"
            )
        return f"{text}\nnot loaded, as asked for: optimizer (masters and moments)"

    def verify(self, rank: int, size: int) -> None:
        """Compares this rank's share of the checksums of all that is needed by any rank."""
        places = (self._keys.place(rule, kind) for kind in self._kinds for rule in self._rules.values())
        self._checkpoint.verify(dict.fromkeys(key for key, _ in places), rank, size)

    @torch.no_grad()
    def read_into(self, shard: TensorShard) -> None:
        """Fills `shard.data`, on any device; vocabulary padding becomes zero."""
        key, at = self._keys.place(self._rules[shard.name], shard.kind)
        dtype = self._checkpoint.dtype(key)
        assert isinstance(shard.data, torch.Tensor), (shard.kind, shard.name)
        if shard.padded_length is not None:
            shard.data.zero_()
        step = max(_PIECE_BYTES // (math.prod(shard.shape[1:]) * STORED_AS[dtype].itemsize), 1)
        for rows, columns, target in shard.parts():
            for start in range(0, len(rows), step):
                piece, inner = target[start : start + step], rows[start : start + step]
                direct = piece.device.type == "cpu" and dtype_name(piece.dtype) == dtype and piece.is_contiguous()
                read = from_torch(piece) if direct else np.empty(piece.shape, STORED_AS[dtype])
                self._checkpoint.read_part(read, key, at, inner, columns)
                if not direct:
                    piece.copy_(to_torch(read, dtype))

    def _as_saved(self, rule: WeightRule) -> WeightRule:
        """A weight with the vocabulary padding it has there. Raises ValueError if that is of another vocabulary."""
        if rule.padded_rows is None:
            return rule
        rows, entries = self._checkpoint.shape(self._keys.place(rule).name)[0], rule.sources[0].shape[0]
        multiple = _multiple(self.run.arguments)
        if rows < entries or (multiple is not None and rows - multiple >= entries):
            raise ValueError(
                f"{self._source.folder}: {rule.name} has {rows} rows, which is no padding of the {entries} entries "
                "that the vocabulary has here: use the tokenizer it was trained with, or the --vocab-size"
            )
        return replace(rule, padded_rows=rows)

    def _check(self, kinds: tuple[str, ...]) -> None:
        model = self._trainer.arguments.model
        self._keys.check(list(self._rules.values()), model.num_layers, model.num_experts, kinds)

    def _has_optimizer(self) -> bool:
        """Whether there is state of the optimizer for any layout. Raises ValueError if there is none at all."""
        if self._keys.has_state:
            return True
        if not self._keys.has_bound_state:
            raise ValueError(
                f"{self._source.folder} holds no optimizer state: add --no-load-optim to go on with a fresh optimizer, "
                "or --finetune to start a new run from its weights"
            )
        return False

    def _check_optimizer(self) -> tuple[str, ...]:
        """The kinds of state that are needed of each weight. Raises ValueError unless all of it is there."""
        check_same_type(self._source, self.run.arguments, self._trainer.arguments)
        own_masters = self._trainer.arguments.model.params_dtype in ("float32", "float64")
        kinds = tuple(kind for kind in self._trainer.optimizer.state_names if kind != MASTER or not own_masters)
        try:
            self._check(kinds)
            if self.run.optimizer_steps is None:
                raise ValueError(f"{self._source.folder} does not say how many steps the optimizer took")
        except ValueError as error:
            raise ValueError(f"{error}: add --no-load-optim to go on with a fresh optimizer") from error
        return kinds

    def _progress(self) -> Progress:
        iteration = self.run.iteration
        if iteration is None:
            raise ValueError(
                f"{self._source.folder} does not say its iteration: add --finetune to start a new run from its weights"
            )
        consumed = self.run.consumed_samples
        if consumed is None:
            consumed = self._trainer.batches.samples_after(iteration)
        scheduled = consumed if self.run.scheduled_samples is None else self.run.scheduled_samples
        return Progress(iteration, consumed, scheduled)


def _multiple(arguments: Any) -> int | None:
    """What the vocabulary was padded to a multiple of, if that is known."""
    unit = getattr(arguments, "make_vocab_size_divisible_by", None)
    ranks = getattr(arguments, "tensor_model_parallel_size", None)
    if not isinstance(unit, int) or not isinstance(ranks, int) or min(unit, ranks) < 1:
        return None
    return unit * ranks
