"""Checkpoints of one file a rank: damage is refused before anything changes, a failed save leaves nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_testing import (
    assert_same_tensors,
    checkpoint_arguments,
    load,
    save,
    state_of,
    tiny_trainer,
    train,
)

from megatron.core.interchange import load_torch, save_torch
from megatron.training.progress import Progress
from megatron.training.setup import Trainer

Saved = tuple[Path, Trainer, Progress]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A checkpoint after a step, the trainer that made it, and its progress."""
    trainer = tiny_trainer(checkpoint_arguments(save=str(tmp_path / "run"), ckpt_format="torch"))
    progress = Progress(iteration=2)
    train(trainer, progress, 1)
    save(trainer, progress)
    return tmp_path / "run", trainer, progress


def _spoil_tracker(root: Path, file: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("3O0")


def _truncate(root: Path, file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(root: Path, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def _drop_a_tensor(root: Path, file: Path) -> None:
    content = load_torch(file)
    content["model"].pop("decoder.final_layernorm.weight")
    save_torch(file, content)


def _add_a_tensor(root: Path, file: Path) -> None:
    content = load_torch(file)
    content["model"]["decoder.surprise"] = torch.zeros(1)
    save_torch(file, content)


def _other_shape(root: Path, file: Path) -> None:
    content = load_torch(file)
    content["model"]["decoder.final_layernorm.weight"] = torch.zeros(7)
    save_torch(file, content)


def _no_optimizer(root: Path, file: Path) -> None:
    content = load_torch(file)
    del content["optimizer"]
    save_torch(file, content)


@pytest.mark.parametrize("same_folder", [True, False], ids=["load_is_save", "load_only"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_tracker, "latest_checkpointed_iteration.txt must hold"),
        (_truncate, "model_optim_rng.pt"),
        (_flip_a_bit, "checksum|cannot read"),
        (_drop_a_tensor, "final_layernorm.weight is missing"),
        (_add_a_tensor, "decoder.surprise is unexpected"),
        (_other_shape, r"final_layernorm.weight has shape \(7,\)"),
        (_no_optimizer, "no optimizer state"),
    ],
)
def test_damage_is_refused_and_nothing_changes(saved: Saved, spoil: object, message: str, same_folder: bool) -> None:
    root, _, _ = saved
    spoil(root, root / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt")  # type: ignore[operator]
    settings = {"load": str(root), "save": str(root)} if same_folder else {"load": str(root)}
    trainer = tiny_trainer(checkpoint_arguments(**settings))
    before = state_of(trainer)
    with pytest.raises(ValueError, match=message):
        load(trainer)
    assert_same_tensors(state_of(trainer), before)


def test_another_programs_progress_is_refused(saved: Saved) -> None:
    root, _, _ = saved
    file = root / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_torch(file)
    content["opt_param_scheduler"] = {"max_lr": 1.0}
    save_torch(file, content)
    with pytest.raises(ValueError, match="not saved by this program: add --finetune"):
        load(tiny_trainer(checkpoint_arguments(load=str(root), no_load_optim=True, no_load_rng=True)))
    progress, _ = load(tiny_trainer(checkpoint_arguments(load=str(root), finetune=True)))
    assert progress == Progress()


def test_a_file_of_another_layout_is_named(saved: Saved) -> None:
    root, _, _ = saved
    (root / "iter_0000003" / "mp_rank_00").rename(root / "iter_0000003" / "mp_rank_01")
    with pytest.raises(ValueError, match=r"incomplete|missing"):
        load(tiny_trainer(checkpoint_arguments(load=str(root))))


def test_a_failed_save_leaves_nothing_and_the_older_step(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    root, trainer, progress = saved

    def disk_full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("megatron.core.interchange.save_torch", disk_full)
    with pytest.raises(ValueError, match="No space left"):
        save(trainer, replace(progress, iteration=4))
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
