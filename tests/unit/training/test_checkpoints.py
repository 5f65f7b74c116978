"""Loading refuses what does not fit before it changes anything; saving and loading give back the same run."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

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

from megatron.training.checkpoints.formats import FORMATS, SAVED_FORMATS, format_of, is_complete
from megatron.training.checkpoints.source import checkpoint_model, load_checkpoint, locate_checkpoint
from megatron.training.config import CheckpointConfig
from megatron.training.progress import Progress, RunRecord, from_saved, to_saved
from megatron.training.setup import Trainer

Saved = tuple[Path, Trainer, Progress]


@pytest.fixture(params=list(SAVED_FORMATS))
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Saved:
    """A checkpoint after three steps, the trainer that made it, and its progress."""
    trainer = tiny_trainer(checkpoint_arguments(save=str(tmp_path / "run"), ckpt_format=request.param))
    progress = Progress()
    train(trainer, progress, 3)
    save(trainer, progress)
    return tmp_path / "run", trainer, progress


def test_every_value_of_the_flag_has_a_format() -> None:
    assert get_args(get_type_hints(CheckpointConfig)["ckpt_format"]) == tuple(SAVED_FORMATS)


def test_a_step_belongs_to_one_format_whole_or_torn(saved: Saved) -> None:
    root, trainer, _ = saved
    step, flag = root / "iter_0000003", trainer.arguments.checkpoint.ckpt_format
    assert format_of(step) is SAVED_FORMATS[flag] and is_complete(step)
    assert SAVED_FORMATS[flag].arguments(step).hidden_size == trainer.arguments.model.hidden_size
    for file in [path for path in step.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.unlink()
        assert [row for row in FORMATS if row.is_mine(step)] == [SAVED_FORMATS[flag]] and not is_complete(step)
        file.write_bytes(content)


@pytest.mark.parametrize("names", [(".metadata",), ("__0_0.distcp",), (".metadata", "__0_0.distcp", "common.pt")])
def test_a_damaged_torch_dist_is_taken_for_nothing_else_though_it_has_a_metadata_file(
    tmp_path: Path, names: list[str]
) -> None:
    step = tmp_path / "iter_0000001"
    step.mkdir()
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    for name in names:
        (step / name).touch()
    with pytest.raises(ValueError, match=r"(cannot read|no checkpoint file) .*/\.metadata"):
        load(tiny_trainer(checkpoint_arguments(load=str(step))))


def test_what_earlier_programs_saved_of_a_run_is_read_as_it_was() -> None:
    saved = {
        "iteration": 3, "consumed_samples": 24, "scheduled_samples": 16, "skipped_iterations": 1,
        "tokens_per_expert": [[1, 3], [2, 2]], "schedule": {"lr": 0.1}, "data_fingerprints": {"a": "f"},
        "grouped_gemm": {"shape": "loop"},
    }  # fmt: skip
    progress, record = from_saved(saved)
    assert progress == Progress(3, 24, 16, 1, [[1, 3], [2, 2]])
    assert record == RunRecord(schedule={"lr": 0.1}, data_fingerprints={"a": "f"}, grouped_gemm={"shape": "loop"})
    assert list(to_saved(progress, record).items()) == list(saved.items())
    older = {name: value for name, value in saved.items() if name != "grouped_gemm"}
    assert from_saved(older) == (progress, replace(record, grouped_gemm={}))


def test_a_run_record_comes_back(saved: Saved) -> None:
    root, trainer, progress = saved
    record = RunRecord(schedule={"lr": 0.1}, data_fingerprints={"a": "f"}, grouped_gemm={"shape": "loop"})
    save(trainer, progress, record)
    for finetune in (False, True):
        resumed = tiny_trainer(checkpoint_arguments(load=str(root), finetune=finetune))
        _, found, _ = load_checkpoint(locate_checkpoint(resumed.arguments, resumed.groups), resumed)
        assert found == (RunRecord() if finetune else record)


def test_a_resumed_run_continues_with_the_same_bits(saved: Saved) -> None:
    root, first, progress = saved
    second = tiny_trainer(checkpoint_arguments(load=str(root)))
    resumed, remark = load(second)
    assert resumed == progress and "resumed at iteration 3" in remark
    assert_same_tensors(state_of(second), state_of(first))
    for trainer, state in ((first, progress), (second, resumed)):
        train(trainer, state, 1)
    assert_same_tensors(state_of(second), state_of(first))


def test_finetuning_takes_weights_only_and_fresh_masters(saved: Saved) -> None:
    root, first, _ = saved
    second = tiny_trainer(checkpoint_arguments(load=str(root), finetune=True))
    progress, remark = load(second)
    assert progress == Progress() and "loaded the weights" in remark
    for ours, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.optimizer.scalars()["steps_taken"] == 0
    for piece in second.optimizer.state_pieces():
        assert torch.equal(piece.tensors["master"], piece.parameter.reshape(-1).float())
        assert not piece.tensors["exp_avg"].any() and not piece.tensors["exp_avg_sq"].any()


def test_another_type_is_refused_unless_only_weights_are_taken(saved: Saved) -> None:
    root, trainer, _ = saved
    arguments = checkpoint_arguments(load=str(root))
    wide = replace(arguments, model=replace(arguments.model, params_dtype="float32"))
    with pytest.raises(ValueError, match="was saved by a run in bfloat16, and this one is in float32"):
        load(tiny_trainer(wide))
    second = tiny_trainer(replace(wide, checkpoint=replace(wide.checkpoint, finetune=True)))
    load(second)
    for ours, theirs in zip(second.model.parameters(), trainer.model.parameters(), strict=True):
        assert (ours == theirs.float()).all()


def test_flags_of_the_first_start_do_not_drop_the_optimizer_at_restarts(saved: Saved) -> None:
    root, first, progress = saved
    second = tiny_trainer(checkpoint_arguments(load=str(root), save=str(root), no_load_optim=True, no_load_rng=True))
    resumed, remark = load(second)
    assert resumed == progress and "do not apply" in remark
    assert torch.equal(state_of(second)[-1], state_of(first)[-1])


def test_an_empty_save_folder_is_a_first_run(tmp_path: Path) -> None:
    trainer = tiny_trainer(checkpoint_arguments(load=str(tmp_path), save=str(tmp_path)))
    progress, remark = load(trainer)
    assert progress == Progress() and "starting from freshly drawn weights" in remark


def test_another_model_is_named(saved: Saved) -> None:
    root, _, _ = saved
    arguments = checkpoint_arguments(load=str(root))
    other = replace(arguments, model=replace(arguments.model, num_experts=2, vocab_size=200))
    with pytest.raises(ValueError, match=r"--vocab-size 203 there, 200 here; --num-experts 4 there, 2 here"):
        load(tiny_trainer(other))


def test_the_shape_is_read_from_the_checkpoint(saved: Saved, tmp_path: Path) -> None:
    root, first, _ = saved
    model = checkpoint_model(str(root))
    assert replace(model, num_query_groups=2, kv_channels=None) == first.arguments.model
    with pytest.raises(ValueError, match="--use-checkpoint-args"):
        checkpoint_model(str(tmp_path / "nowhere"))


def test_finetuning_in_place_is_refused_unless_it_is_a_restart(saved: Saved, tmp_path: Path) -> None:
    root, _, _ = saved
    with pytest.raises(ValueError, match="give another --save folder"):
        load(tiny_trainer(checkpoint_arguments(load=str(root), save=str(root), finetune=True)))
    second = tiny_trainer(checkpoint_arguments(load=str(root), save=str(tmp_path / "new"), finetune=True))
    fresh, _ = load(second)
    save(second, replace(fresh, iteration=7))
    restart = checkpoint_arguments(load=str(tmp_path / "new"), save=str(tmp_path / "new"), finetune=True)
    resumed, _ = load(tiny_trainer(restart))
    assert resumed.iteration == 7


def test_changed_settings_are_named(saved: Saved) -> None:
    root, _, _ = saved
    arguments = checkpoint_arguments(load=str(root))
    changed = replace(arguments, training=replace(arguments.training, seed=9))
    _, remark = load(tiny_trainer(changed))
    assert "--seed was 1234, is 9" in remark
    _, remark = load(tiny_trainer(arguments))
    assert "WARNING" not in remark


def test_a_lost_tracker_is_reported_and_the_newest_complete_step_taken(saved: Saved) -> None:
    root, first, progress = saved
    train(first, progress, 1)
    save(first, progress)
    torn = next(path for path in (root / "iter_0000004").rglob("*") if path.suffix in (".pt", ".safetensors"))
    torn.unlink()
    (root / "latest_checkpointed_iteration.txt").unlink()
    resumed, remark = load(tiny_trainer(checkpoint_arguments(load=str(root), save=str(root))))
    assert resumed.iteration == 3 and "WARNING" in remark and "newest complete step" in remark
    with pytest.raises(ValueError, match="no latest_checkpointed_iteration"):
        load(tiny_trainer(checkpoint_arguments(load=str(root))))


@pytest.mark.parametrize("save_there", [True, False])
def test_a_hugging_face_folder_is_named_with_what_to_do(tmp_path: Path, save_there: bool) -> None:
    (tmp_path / "model.safetensors").touch()
    arguments = checkpoint_arguments(load=str(tmp_path), save=str(tmp_path / ("" if save_there else "run")))
    with pytest.raises(ValueError, match=f"convert it first.*--load-dir {tmp_path}"):
        load(tiny_trainer(arguments))


def test_weights_without_their_optimizer_are_reported(saved: Saved) -> None:
    root, first, progress = saved
    second = tiny_trainer(checkpoint_arguments(load=str(root), no_load_optim=True))
    resumed, remark = load(second)
    assert resumed == progress and "not loaded, as asked for: optimizer" in remark
    assert_same_tensors(list(second.model.parameters()), list(first.model.parameters()))
    assert not any(piece.tensors["exp_avg"].any() for piece in second.optimizer.state_pieces())


def test_old_steps_are_removed_and_torn_ones_do_not_count(saved: Saved) -> None:
    root, trainer, progress = saved
    (root / "iter_0000001").mkdir()  # torn: it has no files
    (root / ".iter_0000002.saving").mkdir()  # what a killed save left
    checkpoint = replace(trainer.arguments.checkpoint, keep_last_checkpoints=2, save_retain_interval=4)
    trainer = replace(trainer, arguments=replace(trainer.arguments, checkpoint=checkpoint))
    for iteration in range(4, 9):
        save(trainer, replace(progress, iteration=iteration))
        if iteration == 5:  # the copy of step 4 is torn before step 6 is saved
            next(path for path in (root / "iter_0000004").rglob("*") if path.is_file()).unlink()
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert names == ["iter_0000001", "iter_0000004", "iter_0000007", "iter_0000008"]
    resumed, _ = load(tiny_trainer(checkpoint_arguments(load=str(root))))
    assert resumed.iteration == 8
