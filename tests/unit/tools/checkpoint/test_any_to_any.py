"""Every command of the table in docs/conversion.md, from any format to any other: the weights stay bit for bit."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_testing import load, save, tiny_trainer, train
from model_testing import tiny_arguments
from test_torch_dist import write_model

from megatron.core.interchange.element_types import to_torch
from megatron.core.interchange.folder_kind import is_model_folder, is_per_rank, is_sharded, is_torch_dist
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.progress import Progress
from megatron.training.setup import Trainer
from tools.checkpoint import util
from tools.checkpoint.loader_mixtral import open_megatron
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource

Weights = dict[str, torch.Tensor]
PAGE = Path(__file__).parents[4] / "docs" / "conversion.md"
ROWS = re.findall(r"^\| ([\w ]+) \| ([\w ]+) \| `(--loader [^`]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
KINDS = {
    "Hugging Face": is_model_folder, "torch": is_per_rank, "torch_dist": is_torch_dist, "sharded": is_sharded,
}  # fmt: skip
"""How to see what a step's folder is."""
FROM_TRAINING = {"torch": "torch", "sharded": tiny_arguments().checkpoint.ckpt_format}
"""The value of --ckpt-format that saves a format."""


def trainer_with(**checkpoint: str | None) -> Trainer:
    """A run of the tiny model of the page's outputs, with 1000 entries, in bfloat16."""
    arguments = tiny_arguments("bfloat16", {**checkpoint, "vocab_size": 1000, "make_vocab_size_divisible_by": 128})
    return tiny_trainer(arguments)


def weights_of(trainer: Trainer) -> Weights:
    """Copies of a run's weights, without vocabulary padding."""
    (model,) = trainer.model  # type: ignore[misc]
    shards = list(named_shards(model, 0))
    return {shard.global_name: shard.data.detach().clone()[: shard.spec.init_rows] for shard in shards}


def read_weights(folder: Path) -> Weights:
    """The weights in a folder of any format."""
    source = HuggingFaceSource(folder) if is_model_folder(folder) else open_megatron(folder, fallback_vocab_size=1000)
    dtype = source.description.dtype
    rules = mixtral_weights(source.description.model)
    return {rule.name: to_torch(source.read(rule, range(rule.shape[0])), dtype) for rule in rules}


def assert_equal(found: Weights, expected: Weights) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Weights]]:
    """A folder of each format under the name that the table has, all with the weights of one run."""
    root = tmp_path_factory.mktemp("formats")
    trainer = trainer_with()
    progress = Progress()
    train(trainer, progress, 1)
    for folder, kind in FROM_TRAINING.items():
        checkpoint = replace(trainer.arguments.checkpoint, save=str(root / folder), ckpt_format=kind)
        save(replace(trainer, arguments=replace(trainer.arguments, checkpoint=checkpoint)), progress)
    command = ["--loader", "mixtral", "--saver", "mixtral_hf", "--load-dir", str(root / "sharded")]
    assert util.main([*command, "--save-dir", str(root / "hf")]) == 0
    write_model(root / "hf", root / "torch-dist" / "iter_0000001", padded=1024)
    (root / "torch-dist" / "latest_checkpointed_iteration.txt").write_text("1")
    yield root, weights_of(trainer)


def test_the_table_has_every_pair() -> None:
    found = [(source, target) for source, target, _ in ROWS]
    assert found == [(source, target) for source in KINDS for target in list(KINDS)[:3]]


@pytest.mark.parametrize(("source", "target", "flags"), ROWS, ids=[f"{row[0]} to {row[1]}" for row in ROWS])
def test_any_format_becomes_any_other(
    folders: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, flags: str
) -> None:
    root, expected = folders
    command = shlex.split(flags)
    given, made = (command[command.index(flag) + 1] for flag in ("--load-dir", "--save-dir"))
    steps = [path for path in (root / given, *(root / given).iterdir()) if KINDS[source](path)]
    assert len(steps) == 1, f"{given} is not in the format {source}"
    for folder in root.iterdir():
        (tmp_path / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    if source == "torch_dist":  # as Megatron-LM saves it
        command += ["--true-vocab-size", "1000"]
    assert util.main(command) == 0
    out = tmp_path / made
    assert any(KINDS[target](path) for path in (out, *out.iterdir()))
    assert_equal(read_weights(out), expected)
    if target != "Hugging Face":  # training starts from it
        trainer = trainer_with(load=str(out))
        load(trainer)
        assert_equal(weights_of(trainer), expected)
