"""Files that are written a few rows at a time."""

import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_testing import MakeModel
from safetensors.torch import load_file

from megatron.core.atomic_files import error_sentence, sync_folder
from megatron.core.interchange import load_torch
from tools.checkpoint import writers
from tools.checkpoint.torch_writer import TorchFile
from tools.checkpoint.writers import SafetensorsFile, TensorPlan, plan_shards

ROOT = Path(__file__).resolve().parents[4]


def test_shards(tmp_path: Path) -> None:
    plans = [TensorPlan(name, (rows, 2), "float32") for name, rows in (("a", 3), ("b", 3), ("c", 9), ("d", 1))]
    assert [[plan.name for plan in shard] for shard in plan_shards(plans, 50)] == [["a", "b"], ["c"], ["d"]]
    tensors = {plan.name: torch.randn(plan.shape) for plan in plans}
    for file, prefix in (
        (SafetensorsFile(tmp_path / "s.safetensors", plans), ""),
        (TorchFile(tmp_path / "s.pt", {"n": 3}, {"model": plans}), "model/"),
    ):
        file.append(prefix + "c", tensors["c"][:4].numpy())
        for name in ("d", "a", "b"):
            file.append(prefix + name, tensors[name].numpy())
        with pytest.raises(ValueError, match=r"c in .* was not written completely: 32 of 72 bytes"):
            file.check_complete()
        with pytest.raises(ValueError, match=r"d in .* is written twice"):
            file.append(prefix + "d", tensors["d"].numpy())
        with pytest.raises(ValueError, match="no place for e"):
            file.append("e", tensors["a"].numpy())
        for wrong in (tensors["a"].double(), torch.ones(1, 3)):
            with pytest.raises(ValueError, match="expected rows of"):
                file.append(prefix + "c", wrong.numpy())
        file.append(prefix + "c", tensors["c"][4:].numpy())
        file.check_complete()
    for loaded in (load_file(tmp_path / "s.safetensors"), load_torch(tmp_path / "s.pt")["model"]):
        assert set(loaded) == set(tensors) and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    theirs = torch.load(tmp_path / "s.pt", weights_only=True, mmap=True)
    assert theirs["n"] == 3 and torch.equal(theirs["model"]["c"], tensors["c"])


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_rows_wherever_they_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows at odd addresses and with gaps, of odd number, more than are written at a time."""
    monkeypatch.setattr(writers, "_PIECE", 5000)
    shapes = {"norm": (100,), "pages": (64, 1024), "odd": (129, 33), "wide": (64, 2048), "last": (8, 512)}
    values = {name: np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16) for name, shape in shapes.items()}
    plans = [TensorPlan(name, shape, "bfloat16") for name, shape in shapes.items()]
    path = tmp_path / "a"
    file = SafetensorsFile(path, plans) if kind == "safetensors" else TorchFile(path, {"n": 3}, {"model": plans})
    for name, value in values.items():
        apart = np.zeros((value.shape[0], 3, *value.shape[1:]), np.uint16)[:, 1]
        apart[...] = value
        odd_place = np.frombuffer(b"x" + value[:1].tobytes(), np.uint8)[1:]
        for start, stop in ((0, 1), (1, 3), (3, 40), (40, value.shape[0])):
            rows = apart[start:stop] if start else odd_place.view(np.uint16)
            file.append(name if kind == "safetensors" else f"model/{name}", rows.reshape(-1, *value.shape[1:]))
    file.check_complete()
    loaded = load_file(path) if kind == "safetensors" else torch.load(path, weights_only=True, mmap=True)["model"]
    for name, value in values.items():
        assert np.array_equal(loaded[name].view(torch.int16).numpy().view(np.uint16), value), name
    if kind == "torch":
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
        assert load_torch(path)["n"] == 3


@pytest.mark.slow
def test_a_file_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    plans = [TensorPlan("a", (1100, 1 << 20), "float32"), TensorPlan("b", (3, 5), "float32")]
    file = TorchFile(tmp_path / "a.pt", {}, {"model": plans})
    rows = np.ones((4, 1 << 20), np.float32)
    for _ in range(1100 // 4):
        file.append("model/a", rows)
    file.append("model/b", np.full((3, 5), 7, np.float32))
    file.check_complete()
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)["model"]
    assert loaded["a"][-1].sum() == 1 << 20 and loaded["b"].sum() == 105
    (tmp_path / "a.pt").unlink()


def test_conversion_does_without_torch(make_model: MakeModel, tmp_path: Path) -> None:
    """Importing it would take longer than converting two gigabytes."""
    program = (
        "import sys; from tools.checkpoint import util, convert_megatron_to_hf_mixtral as back; model = sys.argv[1]; "
        "assert util.main(['--load-dir', model, *'--loader mixtral_hf --saver mixtral --save-dir m "
        "--target-tensor-parallel-size 2 --params-dtype float32'.split()]) == 0; "
        "assert back.main(['--huggingface-config-path', model, *'--megatron-checkpoint-path m "
        "--huggingface-checkpoint-path hf'.split()]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(make_model())]
    subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_errors_of_fsync_name_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = SafetensorsFile(tmp_path / "s.safetensors", [TensorPlan("a", (1,), "float32")])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as raised:
        sync_folder(tmp_path)
    assert error_sentence(raised.value) == f"{tmp_path}: No space left on device"
    file.append("a", torch.zeros(1).numpy())
    with pytest.raises(OSError, match="No space") as raised:
        file.check_complete()
    assert error_sentence(raised.value) == f"{tmp_path / 's.safetensors'}: No space left on device"
