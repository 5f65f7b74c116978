"""A torch_dist folder of Megatron-LM is resumed here with the same bits, or refused before anything changes."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_testing import (
    assert_same_tensors,
    checkpoint_arguments,
    load,
    save,
    save_as_megatron,
    state_of,
    tiny_trainer,
    train,
)
from torch_dist_testing import LOCAL_NORM

from megatron.core.interchange import available_iterations
from megatron.core.interchange.torch_archive import Window
from megatron.core.interchange.torch_dist import CheckpointFolder
from megatron.core.interchange.torch_file import archive_records
from megatron.training.arguments import SHAPE_FIELDS
from megatron.training.checkpoints import torch_dist
from megatron.training.checkpoints.formats import format_of, is_complete
from megatron.training.checkpoints.source import checkpoint_model
from megatron.training.checkpoints.torch_dist import TorchDist
from megatron.training.progress import Progress
from megatron.training.setup import Trainer

Trained = tuple[Path, Trainer]
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A step of ours after three iterations, and the trainer in that state."""
    root = tmp_path_factory.mktemp("trained")
    trainer, progress = tiny_trainer(checkpoint_arguments(save=str(root))), Progress()
    train(trainer, progress, 3)
    save(trainer, progress)
    return root / "iter_0000003", trainer


@pytest.fixture(scope="module")
def megatron(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as Megatron-LM saves it, below a folder with its tracker."""
    root = tmp_path_factory.mktemp("megatron")
    save_as_megatron(trained[0], root / "iter_0000003")
    (root / "latest_checkpointed_iteration.txt").write_text("3")
    return root


WRITTEN: dict[str, dict[str, Any]] = {
    "as main": {},
    "no distributed optimizer, chained": {"masters": "fp32_param", "chained": True, "tp": 1},
    "0.19, prefixes, local layers": {"norms": LOCAL_NORM, "prefix": "model.module.", "common_state": True},
    "layers apart, one file": {"per_layer": True, "files": 1, "tp": 4, "norms": {}},
    "one chunk": {"whole": True, "common": {"optimizer": {"optimizer": {"state": {"common_step": torch.tensor(3.0)}}}}},
}


SLOW = ("0.19, prefixes, local layers", "layers apart, one file")


@pytest.mark.parametrize(
    "written",
    [pytest.param(how, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, how in WRITTEN.items()],
)
def test_a_run_of_megatron_continues_with_the_same_bits(
    trained: Trained, tmp_path: Path, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    read_part = CheckpointFolder.read_part

    def counted(self: CheckpointFolder, target: Any, *args: Any) -> None:
        read_part(self, target, *args)
        parts.append(target.nbytes)

    monkeypatch.setattr(torch_dist, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(CheckpointFolder, "read_part", counted)
    save_as_megatron(trained[0], tmp_path / "iter_0000003", **written)
    ours, theirs = (tiny_trainer(checkpoint_arguments(load=str(step))) for step in (trained[0], tmp_path))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    state = [tensor for piece in theirs.optimizer.state_pieces() for tensor in piece.tensors.values()]
    for tensor in (*(parameter.data for parameter in theirs.model.parameters()), *state):
        tensor.fill_(5)  # so that what is not loaded, vocabulary padding included, is noticed
    expected, (progress, remark) = load(ours)[0], load(theirs)
    assert progress == expected == Progress(3, 24, 24)
    assert "resumed at iteration 3" in remark and "weights and optimizer (masters and moments) that Megatron" in remark
    assert "sample 24 of the data and at 24 samples of the schedule; the order of the data" in remark
    assert "WARNING" not in remark and max(parts) <= 1000
    assert_same_tensors(state_of(theirs), state_of(ours))
    assert train(theirs, progress, 2) == train(ours, expected, 2)
    assert_same_tensors(state_of(theirs), state_of(ours))


def test_finetuning_and_no_load_optim_take_the_weights(trained: Trained, megatron: Path) -> None:
    for settings, begun in (({"finetune": True}, Progress()), ({"no_load_optim": True}, Progress(3, 24, 24))):
        trainer = tiny_trainer(checkpoint_arguments(load=str(megatron), **settings))
        progress, remark = load(trainer)
        assert progress == begun and ("not loaded, as asked for: optimizer" in remark) == ("no_load_optim" in settings)
        _assert_weights_only(trainer, trained[1])


def test_a_run_that_goes_on_in_its_folder_leaves_what_megatron_saved(trained: Trained, tmp_path: Path) -> None:
    save_as_megatron(trained[0], tmp_path / "iter_0000003")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    settings = {"load": str(tmp_path), "save": str(tmp_path), "keep_last_checkpoints": 1}
    trainer = tiny_trainer(checkpoint_arguments(**settings))
    progress, _ = load(trainer)
    for _ in range(2):
        train(trainer, progress, 1)
        save(trainer, progress)
    assert available_iterations(tmp_path) == [3, 5]
    resumed = tiny_trainer(checkpoint_arguments(**settings))
    assert load(resumed)[0] == progress
    assert_same_tensors(state_of(resumed), state_of(trainer))


def _assert_weights_only(trainer: Trainer, theirs: Trainer) -> None:
    for a, b in zip(trainer.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert trainer.optimizer.scalars()["steps_taken"] == 0
    for piece in trainer.optimizer.state_pieces():
        assert torch.equal(piece.tensors["master"], piece.parameter.reshape(-1).float())
        assert not any(piece.tensors[name].any() for name in MOMENTS)


def test_state_that_is_bound_to_a_layout_is_left_with_a_sentence(trained: Trained, tmp_path: Path) -> None:
    save_as_megatron(trained[0], tmp_path / "iter_0000003", bound=True)
    trainer = tiny_trainer(checkpoint_arguments(load=str(tmp_path / "iter_0000003")))
    progress, remark = load(trainer)
    assert progress == Progress(3, 24, 24)
    warning = next(line for line in remark.split("\n") if line.startswith("WARNING"))
    assert "the optimizer starts from scratch" in warning and "--dist-ckpt-optim-fully-reshardable" in warning
    _assert_weights_only(trainer, trained[1])


def test_a_float16_run_keeps_its_loss_scale(trained: Trained, tmp_path: Path) -> None:
    scaler = {"scale": torch.tensor([512.0]), "growth_tracker": 5, "hysteresis_tracker": 1}
    groups = {"param_groups": [{"step": 3}]}
    save_as_megatron(
        trained[0], tmp_path / "iter_0000003", args={"params_dtype": torch.float16},
        common={"optimizer": {"optimizer": groups, "grad_scaler": scaler}},
    )  # fmt: skip
    arguments = checkpoint_arguments(load=str(tmp_path / "iter_0000003"))
    trainer = tiny_trainer(replace(arguments, model=replace(arguments.model, params_dtype="float16")))
    load(trainer)
    assert trainer.optimizer.scalars() == {
        "steps_taken": 3, "loss_scale": 512.0, "good_steps": 5, "tolerated_overflows": 1,
    }  # fmt: skip


def test_the_shape_of_the_model_and_the_kind_of_folder(trained: Trained, megatron: Path) -> None:
    step = megatron / "iter_0000003"
    assert isinstance(format_of(step), TorchDist) and is_complete(step)
    model, ours = checkpoint_model(str(megatron)), trained[1].arguments.model
    assert [getattr(model, name) for name in SHAPE_FIELDS if name != "vocab_size"] == [
        {"kv_channels": 8}.get(name, getattr(ours, name)) for name in SHAPE_FIELDS if name != "vocab_size"
    ]
    assert model.vocab_size is None
    (step / "common.pt").rename(step / "away")
    assert not is_complete(step)
    (step / "away").rename(step / "common.pt")


def _refusal(load_from: Path, **settings: Any) -> str:
    """The sentence that loading ends with; nothing has changed then."""
    model = {name: settings.pop(name) for name in ("params_dtype", "vocab_size", "ffn_hidden_size") if name in settings}
    arguments = checkpoint_arguments(load=str(load_from), **settings)
    trainer = tiny_trainer(replace(arguments, model=replace(arguments.model, **model)))
    before = state_of(trainer)
    with pytest.raises(ValueError) as caught:
        load(trainer)
    assert_same_tensors(state_of(trainer), before)
    return str(caught.value)


def _chunk(step: Path, key: str) -> tuple[Path, int]:
    """A file, and the place of an element of `key` in it."""
    place = CheckpointFolder(step).catalog.tensors[key].chunks[-1].place
    records = archive_records(step / place.file, Window(place.offset, place.length))
    return step / place.file, records["data/0"].start


def test_damage_is_refused_on_whatever_needs_it_and_nothing_changes(megatron: Path) -> None:
    step = megatron / "iter_0000003"
    weight, moment = "decoder.layers.mlp.router.weight", "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight"
    for key, ignored in ((weight, None), (moment, {"no_load_optim": True})):
        path, position = _chunk(step, key)
        whole = path.read_bytes()
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert f"cannot read {path}" in _refusal(megatron)
        if ignored is not None:
            load(tiny_trainer(checkpoint_arguments(load=str(megatron), **ignored)))
        path.write_bytes(whole)
    for name in ("common.pt", ".metadata", path.name):
        whole = (step / name).read_bytes()
        for spoiled in (whole[: len(whole) // 2], b"", None):
            (step / name).unlink() if spoiled is None else (step / name).write_bytes(spoiled)
            assert name in _refusal(megatron)
        (step / name).write_bytes(whole)
    content = bytearray((step / "common.pt").read_bytes())
    content[content.index(b"iteration") + 12] ^= 1
    whole = (step / "common.pt").read_bytes()
    (step / "common.pt").write_bytes(content)
    assert "common.pt: the checksum of" in _refusal(megatron)
    (step / "common.pt").write_bytes(whole)
    load(tiny_trainer(checkpoint_arguments(load=str(megatron))))


class _Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


def test_nothing_in_a_folder_runs(megatron: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    path = megatron / "iter_0000003" / ".metadata"
    whole = path.read_bytes()
    metadata = pickle.loads(whole)
    metadata.planner_data = _Payload()
    path.write_bytes(pickle.dumps(metadata))
    assert "posix.system, which is never run" in _refusal(megatron)
    path.write_bytes(whole)
    assert not list(tmp_path.iterdir())


OTHER_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "width": ({}, {"ffn_hidden_size": 64}, "--ffn-hidden-size 48 there, 64 here"),
    "type": ({}, {"params_dtype": "float32"}, "was saved by a run in bfloat16, and this one is in float32"),
    "vocabulary": ({}, {"vocab_size": 192}, "has 208 rows, which is no padding of the 192 entries"),
    "larger vocabulary": ({"args": {"make_vocab_size_divisible_by": None}}, {"vocab_size": 209}, "of the 209 entries"),
    "arguments": ({"args": {"num_experts": 8}}, {}, "--num-experts 8 there, 4 here"),
    "shared experts": (
        {"extra": {"decoder.layers.mlp.shared_experts.linear_fc1.weight": [((0, 0), torch.zeros(4, 2))]}}, {},
        "has tensors that a Mixtral model does not: decoder.layers.mlp.shared_experts.linear_fc1.weight",
    ),
    "no optimizer": ({"masters": None}, {}, "holds no optimizer state: add --no-load-optim"),
    "other masters": ({"masters": "master"}, {}, "lacks the optimizer's master of embedding.word_embeddings.weight:"),
    "no steps": ({"common": {"optimizer": None}}, {}, "does not say how many steps the optimizer took: add --no-load"),
    "two steps": (
        {"common": {"optimizer": {0: {"step": 3}, 1: {"step": 4}}}}, {}, "parts of the optimizer took 3 and 4 steps"
    ),
    "no iteration": ({"common": {"iteration": None}}, {}, "does not say its iteration: add --finetune"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_what_does_not_fit_is_refused_by_name(trained: Trained, tmp_path: Path, case: str) -> None:
    written, settings, sentence = OTHER_MODELS[case]
    save_as_megatron(trained[0], tmp_path / "iter_0000003", **written)
    assert sentence in _refusal(tmp_path / "iter_0000003", **settings)
