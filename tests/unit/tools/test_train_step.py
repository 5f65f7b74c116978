"""The floor of a training step, its profile, and the table of peers."""

from pathlib import Path

import pytest
import torch

from megatron.core.config import ModelConfig
from megatron.core.models.flops import training_flops_per_token
from megatron.core.models.mixtral.weights import mixtral_table
from tools.benchmarks.contestants import StepShape, our_step
from tools.benchmarks.floor import Floor
from tools.benchmarks.step_profile import GROUPS, profile_groups
from tools.benchmarks.train_step import main

SIZES = {
    "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2,
    "num_experts": 4, "moe_router_topk": 2, "vocab_size": 128,
}  # fmt: skip
SHAPE = StepShape(**SIZES, seq_length=8, micro_batch_size=2, params_dtype="float32", device="cpu")


def test_the_floor_has_the_operations_that_are_counted() -> None:
    floor, model = Floor(SHAPE, parameters=10), ModelConfig(**SIZES)
    assert floor.flops == pytest.approx(16 * training_flops_per_token(model, mixtral_table(model), 8), rel=1e-12)
    assert floor.optimizer_bytes == 10 * (4 + 8 + 8 + 8)  # gradient read; master, two moments read and written
    for operands in floor._operands:
        for a, b, out in operands:
            torch.testing.assert_close(a @ b, out)
    assert len(floor.seconds_of_products()) == len(floor.products)


def test_every_group_of_the_profile_is_met() -> None:
    torch.manual_seed(0)
    contestant = our_step(SHAPE)
    seconds = profile_groups(contestant.model, contestant.step, steps=1)
    assert tuple(seconds) == GROUPS
    assert all(value > 0 for value in seconds.values()), seconds


def test_a_folder_without_megatron_core_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--megatron-core", str(tmp_path)]) == 1
    assert "no Megatron-Core" in capsys.readouterr().err


@pytest.mark.slow
def test_contestants_step_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "megatron" / "core"
    broken.mkdir(parents=True)
    (broken / "package_info.py").touch()
    (broken / "__init__.py").write_text("raise ImportError('made to fail')")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    flags += ["--seq-length=8", "--micro-batch-size=2", "--rounds=1", "--profile", f"--megatron-core={tmp_path}"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    for name in ("this project", "transformers, grouped_mm", "transformers, eager", "floor", "stricter floor"):
        assert any(line.startswith(name) for line in out.splitlines()), name
    assert "absent: Megatron-Core (failed: ImportError: made to fail)" in out


@pytest.mark.parametrize("flag", ["--rounds", "--micro-batch-size", "--seq-length"])
@pytest.mark.parametrize(
    ("given", "reason"), [("0", "at least 1, got 0"), ("-2", "at least 1, got -2"), ("x", "a whole")]
)
def test_sizes_that_are_none_are_refused(
    flag: str, given: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([flag, given])
    assert f"argument {flag}: must be {reason}" in capsys.readouterr().err
