"""Checkpoints of a run with state in the host's memory: bits go on as they were, with any share on the host."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_testing import assert_same_tensors, load, save, tiny_trainer, train
from distributed_testing import run_distributed
from model_testing import tiny_arguments
from torch import Tensor

from megatron.core.dist_checkpointing import snapshot
from megatron.core.optimizer import offload
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.training.checkpoints.sharded import checkpoint_shards
from megatron.training.progress import Progress
from megatron.training.setup import Trainer

OVERLAP = {"num_layers": 1, "overlap_grad_reduce": True, "ddp_bucket_size": 6000}


@pytest.fixture(autouse=True)
def _copies(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_from_a_gpu(monkeypatch)


def _as_from_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "new_copies", lambda device: offload.ImmediateCopies())
    monkeypatch.setattr(offload, "PIECE", 640)


def _trainer(share: float | None, dtype: str, groups: ProcessGroups | None = None, **settings: Any) -> Trainer:
    """With a share of the state on the host, None for a run that knows nothing of it."""
    on_host = {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": share,
        "no_pin_cpu_grads": True,
        "no_pin_cpu_params": True,
    }
    return tiny_trainer(tiny_arguments(dtype, {**settings, **(on_host if share is not None else {})}), groups)


def _whole(trainer: Trainer) -> list[Tensor]:
    """Weights and state by name, wherever they are; collective."""
    state = trainer.optimizer.state_dict()["parameters"]
    return [
        *(parameter.detach().clone() for parameter in trainer.model.parameters()),
        *(state[name][key] for name in sorted(state) for key in trainer.optimizer.state_names),
    ]


def _resumed(folder: Path, then: list[float | None], dtype: str, groups: ProcessGroups, **settings: Any) -> Trainer:
    """A run that is stopped after each step, and goes on with another share of the state on the host."""
    for number, share in enumerate(then):
        own = {"save": str(folder), "load": str(folder)} if number else {"save": str(folder)}
        trainer = _trainer(share, dtype, groups, **own, **settings)
        progress = load(trainer)[0] if number else Progress()
        assert progress.iteration == number
        train(trainer, progress, 1)
        save(trainer, progress)
    return trainer


SHARES: list[float | None] = [0.5, None, 1.0]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "ckpt_format"),
    [
        ("bfloat16", "sharded"),
        ("float32", "torch"),
        pytest.param("bfloat16", "torch", marks=SLOW),
        pytest.param("float32", "sharded", marks=SLOW),
    ],
)
def test_every_start_has_another_share_on_the_host(tmp_path: Path, dtype: str, ckpt_format: str) -> None:
    expected = _trainer(None, dtype, **OVERLAP)
    train(expected, Progress(), len(SHARES))
    found = _resumed(tmp_path, SHARES, dtype, ProcessGroups(), ckpt_format=ckpt_format, **OVERLAP)
    assert_same_tensors(_whole(found), _whole(expected))


def test_only_weights_are_loaded_into_fresh_masters(tmp_path: Path) -> None:
    first = _trainer(1.0, "bfloat16", save=str(tmp_path), **OVERLAP)
    progress = Progress()
    train(first, progress, 1)
    save(first, progress)
    tuned = _trainer(0.5, "bfloat16", load=str(tmp_path), finetune=True, **OVERLAP)
    load(tuned)
    weights = dict(zip(tuned.optimizer.buffers.names.values(), first.model.parameters(), strict=True))
    for name, state in tuned.optimizer.state_dict()["parameters"].items():
        assert torch.equal(state["master"], weights[name].detach().float())
        assert not state["exp_avg"].any()


def test_what_is_saved_is_the_state_itself_and_in_the_background_a_copy() -> None:
    """Nothing passes through the device; the next update would change what the background is writing."""
    trainer = _trainer(1.0, "bfloat16", **OVERLAP)
    state = {
        kept.data.untyped_storage().data_ptr() for part in trainer.optimizer._parts for kept in part.state.values()
    }
    shards = [s for s in checkpoint_shards(trainer.model, trainer.optimizer, trainer.groups) if s.kind != "weight"]
    assert {shard.data.untyped_storage().data_ptr() for shard in shards} == state
    copies = snapshot(shards)
    kept = [replace(shard, data=shard.data.clone()).data for shard in shards]
    train(trainer, Progress(), 1)
    assert_same_tensors([shard.data for shard in copies], kept)
    assert not all(torch.equal(a.data, b) for a, b in zip(shards, kept, strict=True))


def _shared_state(rank: int, world_size: int, folder: str) -> list[bool]:
    """Of two ranks whose shards are on the host in part, by each format; then the same of a run without."""
    zero = {"use_distributed_optimizer": True, **OVERLAP}
    groups = build_process_groups(tiny_arguments("bfloat16", zero).parallel, rank, world_size)
    with pytest.MonkeyPatch.context() as patch:
        _as_from_a_gpu(patch)
        expected = _trainer(None, "bfloat16", groups, **zero)
        train(expected, Progress(), len(SHARES))
        return [
            all(map(torch.equal, _whole(found), _whole(expected)))
            for ckpt_format in ("torch", "sharded")
            for found in [
                _resumed(Path(folder) / ckpt_format, SHARES, "bfloat16", groups, ckpt_format=ckpt_format, **zero)
            ]
        ]


@SLOW
def test_shards_of_several_ranks_go_on_as_well(tmp_path: Path) -> None:
    assert run_distributed(_shared_state, 2, str(tmp_path)) == [[True, True]] * 2
