"""Loading refuses what does not fit before it changes anything; saving and loading give back the same run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.interchange import load_torch, save_torch
from megatron.core.parallel_state import ProcessGroups
from megatron.training.checkpointing import (
    Progress,
    checkpoint_model,
    load_checkpoint,
    locate_checkpoint,
    save_checkpoint,
)
from megatron.training.config import Arguments, CheckpointConfig
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step

GROUPS = ProcessGroups()


def _arguments(**checkpoint: object) -> Arguments:
    return replace(tiny_arguments("bfloat16"), checkpoint=CheckpointConfig(**checkpoint))  # type: ignore[arg-type]


def _trainer(arguments: Arguments) -> Trainer:
    return build_trainer(arguments, GROUPS, torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step)


def _load(trainer: Trainer) -> tuple[Progress, str]:
    source = locate_checkpoint(trainer.arguments, GROUPS)
    return load_checkpoint(source, trainer.arguments, GROUPS, trainer.model, trainer.optimizer)


def _state(trainer: Trainer) -> list[torch.Tensor]:
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    return weights + [tensor.clone() for piece in trainer.optimizer.state_pieces() for tensor in piece.tensors.values()]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Trainer, Progress]:
    """A checkpoint after three steps, the trainer that made it, and its progress."""
    trainer = _trainer(_arguments(save=str(tmp_path / "run")))
    progress = Progress()
    for step in range(3):
        train_step(trainer, iter(step_batches(step, 0, 1)), progress)
    save_checkpoint(trainer.arguments, GROUPS, trainer.model, trainer.optimizer, progress)
    return tmp_path / "run", trainer, progress


def test_a_resumed_run_continues_with_the_same_bits(saved: tuple[Path, Trainer, Progress]) -> None:
    root, first, progress = saved
    second = _trainer(_arguments(load=str(root)))
    resumed, remark = _load(second)
    assert resumed == progress and "resumed at iteration 3" in remark
    for ours, theirs in zip(_state(second), _state(first), strict=True):
        assert torch.equal(ours, theirs)
    for trainer, state in ((first, progress), (second, resumed)):
        train_step(trainer, iter(step_batches(3, 0, 1)), state)
    for ours, theirs in zip(_state(second), _state(first), strict=True):
        assert torch.equal(ours, theirs)


def test_finetuning_takes_weights_only_and_fresh_masters(saved: tuple[Path, Trainer, Progress]) -> None:
    root, first, _ = saved
    second = _trainer(_arguments(load=str(root), finetune=True))
    progress, remark = _load(second)
    assert progress == Progress() and "loaded the weights" in remark
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.optimizer.scalars()["steps_taken"] == 0
    for piece in second.optimizer.state_pieces():
        assert torch.equal(piece.tensors["master"], piece.parameter.reshape(-1).float())
        assert not piece.tensors["exp_avg"].any() and not piece.tensors["exp_avg_sq"].any()


def test_flags_of_the_first_start_do_not_drop_the_optimizer_at_restarts(saved: tuple[Path, Trainer, Progress]) -> None:
    root, first, progress = saved
    second = _trainer(_arguments(load=str(root), save=str(root), no_load_optim=True, no_load_rng=True))
    resumed, remark = _load(second)
    assert resumed == progress and "do not apply" in remark
    assert torch.equal(_state(second)[-1], _state(first)[-1])


def test_an_empty_save_folder_is_a_first_run(tmp_path: Path) -> None:
    trainer = _trainer(_arguments(load=str(tmp_path), save=str(tmp_path)))
    progress, remark = _load(trainer)
    assert progress == Progress() and "starting from freshly drawn weights" in remark


def _spoil_tracker(root: Path, file: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").write_text("3O0")


def _lose_tracker(root: Path, file: Path) -> None:
    (root / "latest_checkpointed_iteration.txt").unlink()


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
        (_lose_tracker, "no latest_checkpointed_iteration.txt"),
        (_truncate, "model_optim_rng.pt"),
        (_flip_a_bit, "checksum|cannot read"),
        (_drop_a_tensor, "final_layernorm.weight is missing"),
        (_add_a_tensor, "decoder.surprise is unexpected"),
        (_other_shape, r"final_layernorm.weight has shape \(7,\)"),
        (_no_optimizer, "no optimizer state"),
    ],
)
def test_damage_is_refused_and_nothing_changes(
    saved: tuple[Path, Trainer, Progress], spoil: object, message: str, same_folder: bool
) -> None:
    root, _, _ = saved
    spoil(root, root / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt")  # type: ignore[operator]
    settings = {"load": str(root), "save": str(root)} if same_folder else {"load": str(root)}
    trainer = _trainer(_arguments(**settings))
    before = _state(trainer)
    with pytest.raises(ValueError, match=message):
        _load(trainer)
    for ours, theirs in zip(_state(trainer), before, strict=True):
        assert torch.equal(ours, theirs)


def test_another_model_or_layout_is_named(saved: tuple[Path, Trainer, Progress]) -> None:
    root, _, _ = saved
    arguments = _arguments(load=str(root))
    other = replace(arguments, model=replace(arguments.model, num_experts=2, vocab_size=200))
    with pytest.raises(ValueError, match=r"--vocab-size 203 there, 200 here; --num-experts 4 there, 2 here"):
        _load(_trainer(other))
    (root / "iter_0000003" / "mp_rank_00").rename(root / "iter_0000003" / "mp_rank_01")
    with pytest.raises(ValueError, match=r"incomplete|missing"):
        _load(_trainer(arguments))


def test_the_shape_is_read_from_the_checkpoint(saved: tuple[Path, Trainer, Progress], tmp_path: Path) -> None:
    root, first, _ = saved
    model = checkpoint_model(str(root))
    assert replace(model, num_query_groups=2, kv_channels=None) == first.arguments.model
    with pytest.raises(ValueError, match="--use-checkpoint-args"):
        checkpoint_model(str(tmp_path / "nowhere"))


def test_finetuning_in_place_is_refused_unless_it_is_a_restart(
    saved: tuple[Path, Trainer, Progress], tmp_path: Path
) -> None:
    root, _, _ = saved
    with pytest.raises(ValueError, match="give another --save folder"):
        _load(_trainer(_arguments(load=str(root), save=str(root), finetune=True)))
    second = _trainer(_arguments(load=str(root), save=str(tmp_path / "new"), finetune=True))
    fresh, _ = _load(second)
    save_checkpoint(second.arguments, GROUPS, second.model, second.optimizer, replace(fresh, iteration=7))
    restart = _arguments(load=str(tmp_path / "new"), save=str(tmp_path / "new"), finetune=True)
    resumed, _ = _load(_trainer(restart))
    assert resumed.iteration == 7


def test_changed_settings_are_named(saved: tuple[Path, Trainer, Progress]) -> None:
    root, _, _ = saved
    arguments = _arguments(load=str(root))
    changed = replace(arguments, training=replace(arguments.training, seed=9))
    _, remark = _load(_trainer(changed))
    assert "--seed was 1234, is 9" in remark
    _, remark = _load(_trainer(arguments))
    assert "WARNING" not in remark


def test_another_programs_progress_is_refused(saved: tuple[Path, Trainer, Progress]) -> None:
    root, _, _ = saved
    file = root / "iter_0000003" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_torch(file)
    content["opt_param_scheduler"] = {"max_lr": 1.0}
    save_torch(file, content)
    with pytest.raises(ValueError, match="not saved by this program: add --finetune"):
        _load(_trainer(_arguments(load=str(root), no_load_optim=True, no_load_rng=True)))
    progress, _ = _load(_trainer(_arguments(load=str(root), finetune=True)))
    assert progress == Progress()


def test_a_failed_save_leaves_nothing_and_the_older_step(
    saved: tuple[Path, Trainer, Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, trainer, progress = saved

    def disk_full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("megatron.core.interchange.save_torch", disk_full)
    with pytest.raises(ValueError, match="No space left"):
        save_checkpoint(trainer.arguments, GROUPS, trainer.model, trainer.optimizer, replace(progress, iteration=4))
    assert sorted(path.name for path in root.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
