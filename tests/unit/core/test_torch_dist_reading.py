"""Any part of a matrix in a distributed checkpoint is read from whatever chunks it was saved in."""

import argparse
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_dist_testing import Pieces, save_torch_dist

from megatron.core.interchange.torch_dist import CheckpointFolder, saved_run

WHOLE = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
VECTOR = torch.arange(24.0).view(2, 12)


def _cut(whole: torch.Tensor, cuts: tuple[tuple[int, ...], ...]) -> Pieces:
    """The chunks of a tensor between `cuts` of each axis."""
    spans = [itertools.pairwise((0, *places, size)) for places, size in zip(cuts, whole.shape, strict=True)]
    pieces = []
    for span in itertools.product(*spans):
        at = tuple(begin for begin, _ in span)
        pieces.append((at, whole[tuple(slice(*ends) for ends in span)].contiguous()))
    return pieces


def test_any_part_is_read_from_any_chunks(tmp_path: Path) -> None:
    chunks = {
        "a layer and an expert each": ((1,), (1, 2), (), ()), "rows": ((), (2,), (5, 6), ()),
        "columns": ((1,), (), (), (3, 7)), "both": ((1,), (1, 2), (4,), (9,)), "one": ((), (), (), ()),
    }  # fmt: skip
    tensors = {name: _cut(WHOLE, cuts) for name, cuts in chunks.items()}
    tensors["vector"] = _cut(VECTOR, ((1,), (7,)))
    save_torch_dist(tmp_path / "step", tensors, argparse.Namespace())
    checkpoint, draw = CheckpointFolder(tmp_path / "step"), random.Random(0)
    checkpoint.verify(tensors)
    for name, _ in itertools.product(tensors, range(20)):
        rows, columns = (range(*sorted(draw.sample(range(size + 1), 2))) for size in (12, 10))
        at = (draw.randrange(2), draw.randrange(3))
        if name == "vector":
            found = np.empty((len(rows), 1), np.float32)
            checkpoint.read_part(found, name, at[:1], rows, range(1))
            assert np.array_equal(found[:, 0], VECTOR[at[0], rows.start : rows.stop].numpy())
            continue
        found = np.empty((len(rows), len(columns)), np.float32)
        checkpoint.read_part(found, name, at, rows, columns)
        assert np.array_equal(found, WHOLE[(*at, slice(rows.start, rows.stop), slice(columns.start, columns.stop))])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_processes_compare_every_chunk_once_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    save_torch_dist(tmp_path / "step", {"a": _cut(WHOLE, ((1,), (1, 2), (), ()))}, argparse.Namespace())
    compared = []
    monkeypatch.setattr(
        "megatron.core.interchange.stored_tensor.ZipRecords.verify", lambda _, offset: compared.append(offset)
    )
    for rank in range(size):
        CheckpointFolder(tmp_path / "step").verify(["a"], rank, size)
    assert len(compared) == 6


def test_what_common_state_says_is_taken_as_far_as_it_is_a_number(tmp_path: Path) -> None:
    nested: dict[str, object] = {"param_groups": [{"step": torch.tensor(9.0)}, {"step": 9}], "grad_scaler": {}}
    nested["state"] = {"common_step": 9, "again": [nested["param_groups"]] * 3}
    args = argparse.Namespace(seed=1, betas=(0.9, 0.95), consumed_train_samples=1e400, backend=Path)
    common = {"iteration": True, "optimizer": {0: {"optimizer": nested}}, "opt_param_scheduler": {"num_steps": -1}}
    save_torch_dist(tmp_path / "step", {"a": _cut(VECTOR, ((), ()))}, args, common=common)
    run = saved_run(CheckpointFolder(tmp_path / "step"))
    assert run.optimizer_steps == 9 and vars(run.arguments).keys() == {"seed", "betas", "consumed_train_samples"}
    assert (run.iteration, run.consumed_samples, run.scheduled_samples, run.loss_scale) == (None,) * 4
