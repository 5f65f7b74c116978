"""The optimizer's flags through the real program: restarts, growing batches, float16, steps that are not finite."""

import json
import sys
from pathlib import Path

import pytest
import torch
from test_resume import FLAGS, assert_equal, pretrain

import pretrain_gpt
from megatron.core.interchange import load_torch
from megatron.training import training
from megatron.training.environment import Environment
from megatron.training.initialize import SharedError


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(path: Path) -> list[dict[str, float]]:
    """The log without what depends on the clock."""
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines(path)]


SHARDED = (
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 3000 "
    "--fp16 --initial-loss-scale 1048576 --loss-scale-window 2 --hysteresis 1 --deterministic-mode "
    "--micro-batch-size 1 --rampup-batch-size 2 2 8 --lr-decay-style WSD --lr-wsd-decay-iters 2 --decoupled-lr 2e-2 "
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1 --ckpt-format torch"
).split()


@pytest.mark.slow
def test_a_restart_with_everything_on_changes_nothing(tmp_path: Path) -> None:
    """Distributed optimizer, float16, growing batch and weight decay; the first run again gives the same bits.

    So does one with half of the optimizer's state in the host's memory, and all of it after a restart.
    """
    halves = ["--save", str(tmp_path / "halves"), "--load", str(tmp_path / "halves")]
    halves += ["--metrics-path", str(tmp_path / "halves.jsonl")]
    runs = [
        ["--save", str(tmp_path / name), "--metrics-path", f"{tmp_path / name}.jsonl"] for name in ("whole", "again")
    ]
    offload = ["--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d"]
    first_half = [*halves, "--exit-interval", "3", *offload, "--optimizer-offload-fraction", "0.5"]
    for flags in (*runs, first_half, [*halves, *offload]):
        result = pretrain(2, *SHARDED, *flags)
        assert result.returncode == 0, result.stderr
    whole = numbers(tmp_path / "whole.jsonl")
    assert [line["global_batch_size"] for line in whole] == [2, 2, 2, 2, 4, 4]
    assert [line["consumed_samples"] for line in whole] == [2, 4, 6, 8, 12, 16]
    assert len({line["loss_scale"] for line in whole}) > 2
    assert numbers(tmp_path / "again.jsonl") == whole
    assert numbers(tmp_path / "halves.jsonl") == whole
    (expected,) = (tmp_path / "whole" / "iter_0000006").glob("*/model_optim_rng.pt")
    theirs = load_torch(expected)
    for other in ("again", "halves"):
        ours = load_torch(tmp_path / other / expected.relative_to(tmp_path / "whole"))
        for key in theirs.keys() - {"args"}:
            assert_equal(ours[key], theirs[key], key)


def run_here(monkeypatch: pytest.MonkeyPatch, *flags: str, poison: float | None = None) -> None:
    """Runs the program in this process; the loss of every microbatch is multiplied by `poison`."""

    def forward_step(*arguments):
        output, result = pretrain_gpt.forward_step(*arguments)
        return (output, result) if poison is None else (output * poison, result)

    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *FLAGS, *flags])
    environment = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    training._pretrain(environment, pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, forward_step)


def test_skipped_steps_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    with pytest.raises(SharedError, match=r"of 3 iteration\(s\) in a row, up to 3, were not finite"):
        run_here(monkeypatch, "--max-skipped-iterations", "3", "--metrics-path", str(log), poison=float("nan"))
    assert [line["skipped"] for line in lines(log)] == [True] * 3
    with pytest.raises(SharedError, match=r"of 1 iteration\(s\) in a row, up to 1, were not finite"):
        run_here(monkeypatch, "--check-for-nan-in-loss-and-grad", poison=float("inf"))


def test_the_search_for_a_loss_scale_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    flags = ["--fp16", "--hysteresis", "1", "--max-skipped-iterations", "2", "--metrics-path", str(log)]
    run_here(monkeypatch, *flags, "--initial-loss-scale", str(2.0**40), "--train-iters", "30", "--lr-decay-iters", "6")
    skipped = [line["skipped"] for line in lines(log)]
    assert skipped[:10] == [True] * 10 and not skipped[-1]
    with pytest.raises(SharedError, match=r"of 2 iteration\(s\)"):  # nowhere to go from the lowest scale
        run_here(monkeypatch, *flags[:-2], "--min-loss-scale", str(2.0**40), "--initial-loss-scale", str(2.0**40))


def test_float16_trains_as_float32_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, flags in (("half", ["--fp16", "--loss-scale", "1024"]), ("single", [])):
        run_here(monkeypatch, *flags, "--metrics-path", str(tmp_path / name))
    for ours, theirs in zip(lines(tmp_path / "half"), lines(tmp_path / "single"), strict=True):
        assert ours["loss_scale"] == 1024 and not ours["skipped"]
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=5e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)


def test_deterministic_mode_gives_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    try:
        for name in ("first", "second"):
            run_here(monkeypatch, "--bf16", "--deterministic-mode", "--metrics-path", str(tmp_path / name))
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory
        assert numbers(tmp_path / "first") == numbers(tmp_path / "second")
        monkeypatch.setenv("NCCL_ALGO", "NVLS")
        with pytest.raises(ValueError, match="--deterministic-mode does not allow NCCL_ALGO=NVLS"):
            run_here(monkeypatch, "--deterministic-mode")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def test_ramps_that_do_not_fit_the_replicas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a batch of 3 is not a multiple of --micro-batch-size \(2\)"):
        run_here(monkeypatch, "--rampup-batch-size", "2", "1", "100")


def test_a_constant_loss_scale_changes_no_update_in_float64() -> None:
    """The auxiliary losses, which are attached inside the model, are scaled with the loss."""
    from model_testing import train_tiny

    for clip_grad in (0.0, 1.0):
        # with so large an epsilon, an update depends on the size of the gradient
        settings = {"clip_grad": clip_grad, "adam_eps": 1.0}
        plain = train_tiny(0, 1, settings, "float64", 2)
        scaled = train_tiny(0, 1, settings | {"loss_scale": 3.0}, "float64", 2)
        for key, (weight, *_) in plain.weights.items():
            torch.testing.assert_close(scaled.weights[key][0], weight, rtol=1e-12, atol=1e-13)
        assert scaled.numbers[0]["grad_norm"] == pytest.approx(plain.numbers[0]["grad_norm"], rel=1e-12)
