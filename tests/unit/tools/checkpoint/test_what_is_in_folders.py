"""What else lies in a model folder or around it: it is not read for a model, nor in the way, and it is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conversion_testing import MakeModel, assert_same_tensors, disk_tensors

from tools.checkpoint import util

Capture = pytest.CaptureFixture[str]


def convert(source: Path, target: Path, *flags: str) -> int:
    command = ["--loader", "mixtral_hf", "--saver", "mixtral_hf", "--load-dir", str(source), "--save-dir", str(target)]
    return util.main([*command, *flags])


def test_folders_and_hidden_files_among_the_companions_stay_behind(copy_model: MakeModel, tmp_path: Path) -> None:
    source = copy_model()
    generate, templates = source / "custom_generate", tmp_path / "elsewhere"
    (generate / "__pycache__").mkdir(parents=True)
    (generate / "generate.py").write_text("import torch")
    (generate / "__pycache__" / "generate.cpython-311.pyc").touch()
    (generate / ".DS_Store").touch()
    templates.mkdir()
    (templates / "tools.jinja").write_text("{{ tools }}")
    (templates / ".tools.jinja").touch()
    (source / "additional_chat_templates").symlink_to(templates)
    assert convert(source, tmp_path / "out") == 0
    for folder, names in (("custom_generate", ["generate.py"]), ("additional_chat_templates", ["tools.jinja"])):
        assert os.listdir(tmp_path / "out" / folder) == names
    (generate / "more.py").symlink_to("gone.py")
    assert convert(source, tmp_path / "second") == 1 and not (tmp_path / "second").exists()


def test_code_that_settings_name_but_is_not_there(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = copy_model()
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["my_tokens.T", None]}}))
    assert convert(source, tmp_path / "out", "--dry-run") == 1
    assert "has no file my_tokens.py, which tokenizer_config.json names in auto_map" in capsys.readouterr().err
    (source / "my_tokens.py").touch()
    assert convert(source, tmp_path / "out") == 0 and (tmp_path / "out" / "my_tokens.py").exists()


def test_the_folder_around_a_model_names_it(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    model = copy_model("models/mine")
    assert convert(tmp_path / "models", tmp_path / "out") == 1
    assert f"holds model folders and is none itself: give {model}" in capsys.readouterr().err
    snapshots = tmp_path / "hub" / "models--a--b" / "snapshots"
    for name in ("abandoned", "whole"):
        (snapshots / name).mkdir(parents=True)
    (snapshots / "whole" / "model.safetensors").touch()
    assert convert(tmp_path / "hub", tmp_path / "out") == 1
    assert capsys.readouterr().err.strip().endswith(f"give {snapshots / 'whole'}")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "it is empty"),
        (["Config.json", "model.safetensors"], "there are Config.json, model.safetensors"),
        (["config.json", "model-00001-of-00002.safetensors"], "but there are config.json, model-00001-of-00002.safe"),
        (["model.tar"], "there are model.tar"),
        ([f"{number}.bin" for number in range(8)], "there are 0.bin, 1.bin, 2.bin, 3.bin, 4.bin and 3 more"),
    ],
)
def test_a_folder_that_lacks_what_a_model_has_says_what_it_has(
    tmp_path: Path, capsys: Capture, names: list[str], words: str
) -> None:
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_text("{}")
    assert convert(tmp_path / "source", tmp_path / "out") == 1
    assert words in capsys.readouterr().err


def test_of_two_sets_of_weights_the_one_that_is_read_is_named(
    make_model: MakeModel, copy_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    sharded = copy_model("sharded", form="sharded")
    assert convert(sharded, tmp_path / "one") == 0 and "note: " not in capsys.readouterr().err
    other = make_model(seed=1)
    shutil.copy(other / "model.safetensors", sharded)
    (sharded / "pytorch_model.bin").touch()  # older, and often there as well
    assert convert(sharded, tmp_path / "two") == 0
    said = capsys.readouterr().err
    assert "has model.safetensors and model.safetensors.index.json: the first is read, as by transformers" in said
    assert_same_tensors(tmp_path / "two", disk_tensors(other))
