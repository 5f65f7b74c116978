"""Output into the folder of the config: until the new weights are complete it is the old model, then the new one."""

import json
import os
from pathlib import Path

import pytest
import torch
from conversion_testing import TOKENIZER, MakeModel, disk_tensors
from safetensors.torch import load_file

from tools.checkpoint import convert_megatron_to_hf_mixtral, saver_mixtral_hf, util
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two models are the same in every bit."""
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def what_loads(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as transformers would find it: its order of files, and no file may lack what the index promises."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    for index, load in (
        ("model.safetensors.index.json", load_file),
        ("pytorch_model.bin.index.json", lambda file: torch.load(file, weights_only=True)),
    ):
        if (folder / index).exists():
            weight_map = json.loads((folder / index).read_text())["weight_map"]
            found = {file: load(folder / file) for file in set(weight_map.values())}
            return {name: found[file][name] for name, file in weight_map.items()}
    raise AssertionError(f"nothing to load in {sorted(os.listdir(folder))}")


def export(source: Path, folder: Path, shard_size: str) -> int:
    return convert_megatron_to_hf_mixtral.main(
        ["--megatron-checkpoint-path", str(source), "--huggingface-config-path", str(folder),
         "--huggingface-checkpoint-path", str(folder), "--max-shard-size", shard_size]
    )  # fmt: skip


def to_megatron(source: Path, target: Path) -> None:
    flags = ["--loader", "mixtral_hf", "--saver", "mixtral", "--load-dir", str(source), "--save-dir", str(target)]
    assert util.main(flags) == 0


@pytest.fixture
def trained(make_model: MakeModel, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A Megatron checkpoint whose weights are not those of the folders it is exported to."""
    source = make_model(seed=1)
    to_megatron(source, tmp_path / "m")
    return tmp_path / "m", disk_tensors(source)


@pytest.mark.parametrize("shard_size", ["1GB", "60KB", "40KB"])
@pytest.mark.parametrize("form", ["single", "sharded", "fused", "bin"])
def test_old_weights_are_replaced_and_nothing_stale_is_left(
    copy_model: MakeModel, trained: tuple[Path, dict[str, torch.Tensor]], form: str, shard_size: str
) -> None:
    folder = copy_model(form=form)
    for _ in range(3):
        assert export(trained[0], folder, shard_size) == 0
        assert same(disk_tensors(folder), trained[1])
        assert same(what_loads(folder), trained[1])
        weights = {name for name in os.listdir(folder) if name.startswith(("model", "pytorch_model"))}
        assert not any("bin" in name for name in weights)
        assert ("model.safetensors" in weights) != ("model.safetensors.index.json" in weights)
        others = set(os.listdir(folder)) - weights
        assert others == {"config.json", "generation_config.json", *TOKENIZER}
        HuggingFaceSource(folder)


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("form", ["single", "sharded", "bin", "ours"])
def test_killed_at_any_point(
    copy_model: MakeModel,
    trained: tuple[Path, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    shard_size: str,
) -> None:
    """Each rename and removal in turn is the last thing that happens; the folder loads, as the old or the new model."""
    original = trained[0].parent / "original"
    if form == "ours":
        to_megatron(copy_model("source"), original)
    outcomes = []
    for survived in range(200):
        folder = copy_model(f"hf{survived}", form="single" if form == "ours" else form)
        if form == "ours":  # shards whose names the next export would use too
            assert export(original, folder, "60KB") == 0
        old = what_loads(folder)
        calls = 0

        def dying(function, survived=survived):  # type: ignore[no-untyped-def]
            def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
                nonlocal calls
                calls += 1
                if calls > survived:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(saver_mixtral_hf.os, "replace", dying(os.replace))
            patch.setattr(saver_mixtral_hf.Path, "unlink", dying(Path.unlink))
            code = export(trained[0], folder, shard_size)
        found = what_loads(folder)
        is_new = same(found, trained[1])
        assert is_new or same(found, old)
        outcomes.append(is_new)
        if code == 0:
            break
    assert code == 0 and outcomes == sorted(outcomes)
    assert not outcomes[0] and outcomes[-1] and len(outcomes) > 3
