"""The verify tool: weights and logits of a checkpoint against transformers, at the checkpoint's own layout."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from conversion_testing import MakeModel

from megatron.core.interchange import load_torch, save_torch
from tools.checkpoint import util, verify
from tools.checkpoint.verify_logits import compared_length

Capture = pytest.CaptureFixture[str]


def to_megatron(source: Path, target: Path, flags: str = "") -> None:
    command = f"--loader mixtral_hf --saver mixtral --load-dir '{source}' --save-dir '{target}' {flags}"
    assert util.main(shlex.split(command)) == 0


def run(source: Path, checkpoint: Path, *flags: str) -> int:
    return verify.main(["--huggingface-path", str(source), "--megatron-path", str(checkpoint), *flags])


@pytest.mark.parametrize(
    "flags",
    [
        "",
        pytest.param("--target-tensor-parallel-size 2", marks=pytest.mark.slow),
        pytest.param("--target-pipeline-layers 1,3 --target-expert-parallel-size 2", marks=pytest.mark.slow),
        pytest.param(
            "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-expert-parallel-size 2 "
            "--target-expert-tensor-parallel-size 1 --target-num-virtual-stages-per-pipeline-rank 2",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one rank", "TP2", "PP1,3 EP2", "TP2 PP2 VPP2 EP2 ETP1"],
)
def test_a_converted_model_is_the_same(make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: str) -> None:
    source = make_model(dtype=torch.float32)
    to_megatron(source, tmp_path / "m", flags)
    assert run(source, tmp_path / "m", "--logits", "--tokens", "16") == 0
    printed = capsys.readouterr().out
    assert "weights: equal bit for bit" in printed and "the largest difference is" in printed


def test_no_more_tokens_than_the_window_are_compared(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = copy_model(dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    to_megatron(source, tmp_path / "m")
    assert run(source, tmp_path / "m", "--logits", "--tokens", "32") == 0
    assert "8 tokens are compared: training does not go beyond the sliding window of 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "window", "tensor", "compared"),
    [(5, None, 1, 5), (5, None, 4, 8), (5, 6, 4, 4), (64, 64, 4, 64), (64, 63, 4, 60), (1, 8, 8, 8)],
)
def test_the_compared_length(length: int, window: int | None, tensor: int, compared: int) -> None:
    assert compared_length(length, window, tensor) == compared


def test_a_window_too_short_for_the_layout_is_named() -> None:
    with pytest.raises(ValueError, match="sliding_window of 3"):
        compared_length(64, 3, 4)


@pytest.mark.parametrize(
    "name",
    [
        "self_attention.linear_qkv.weight",
        pytest.param("mlp.experts.local_experts.0.linear_fc1.weight", marks=pytest.mark.slow),
    ],
)
def test_rows_in_the_wrong_place_are_found(make_model: MakeModel, tmp_path: Path, capsys: Capture, name: str) -> None:
    """Rows of layer 2 swapped in one rank's file: the weight is named, and layer 2 is the first to diverge."""
    source = make_model(dtype=torch.float32)
    to_megatron(source, tmp_path / "m", "--target-tensor-parallel-size 2")
    path = tmp_path / "m" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = load_torch(path)
    weight = content["model"][f"decoder.layers.2.{name}"]
    weight[[0, -1]] = weight[[-1, 0]]
    save_torch(path, content)
    assert run(source, tmp_path / "m", "--logits", "--tokens", "16") == 1
    captured = capsys.readouterr()
    assert "weights: 1 differ" in captured.out and f"decoder.layers.2.{name}: 64 elements differ" in captured.out
    assert "layer 2 is the first to diverge" in captured.out
    assert captured.err.count("error: ") == 1 and "not the same model: weights, logits differ" in captured.err


def test_another_model_and_another_type(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    to_megatron(make_model(), tmp_path / "m", "--params-dtype float32")
    assert run(make_model(), tmp_path / "m") == 0
    assert "types differ, bfloat16 there and float32 here" in capsys.readouterr().out
    assert run(make_model(seed=1), tmp_path / "m") == 1
    assert "weights differ" in capsys.readouterr().err
    assert run(make_model(experts=8), tmp_path / "m") == 1
    assert "num_local_experts is 8" in capsys.readouterr().err
