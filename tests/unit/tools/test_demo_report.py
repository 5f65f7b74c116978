"""The demo's closing checks: a resumed run's metrics, the loss in transformers, the picture, the working folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tools.demo import report, run
from tools.demo.console import StageFailed
from tools.demo.model import MODEL, make_model, train_tokenizer


def write_metrics(path: Path, iterations: list[int], evaluations: list[int]) -> report.Metrics:
    lines = [{"iteration": i, "lm_loss": 8.0 - 0.1 * i, "tokens_per_second": 100.0} for i in iterations]
    lines += [{"iteration": i, "validation_loss": 8.0 - 0.1 * i} for i in evaluations]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 99, "lm_')
    return report.read_metrics(path)


def test_metrics_are_read_up_to_a_line_that_is_being_written(tmp_path: Path) -> None:
    metrics = write_metrics(tmp_path / "m", [1, 2], [2])
    assert metrics.steps == [(1, 7.9), (2, 7.8)]
    assert metrics.evaluations == [(2, 7.8)]
    assert report.read_metrics(tmp_path / "none").steps == []


@pytest.mark.parametrize(
    ("iterations", "evaluations"),
    [([1, 2, 3], [3]), ([1, 2, 2, 3, 4], [4]), ([1, 2, 4], [4]), ([1, 2, 3, 4], [2]), ([1, 2, 3, 4], [])],
)
def test_a_run_that_lost_or_repeated_a_step_fails(
    tmp_path: Path, iterations: list[int], evaluations: list[int]
) -> None:
    report.check_run(write_metrics(tmp_path / "good", [1, 2, 3, 4], [2, 4]), 4)
    with pytest.raises(StageFailed):
        report.check_run(write_metrics(tmp_path / "bad", iterations, evaluations), 4)


class Fixed(torch.nn.Module):
    """Predicts token 1 with probability 1/2 and three others with 1/6 each."""

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]).log()
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, 4))


def test_the_loss_is_the_mean_over_unmasked_tokens_of_all_samples() -> None:
    def sample(labels: list[int], mask: list[int]) -> dict[str, np.ndarray]:
        return {"tokens": np.zeros(4, np.int64), "labels": np.array(labels), "loss_mask": np.array(mask, np.float32)}

    samples = [sample([1, 1, 2, 0], [1, 1, 1, 0]), sample([1] * 4, [1] * 4), sample([3, 1, 1, 1], [1, 0, 0, 0])]
    expected = (6 * math.log(2) + 2 * math.log(6)) / 8
    for batch in (1, 2, 3):
        assert report.transformers_loss(Fixed(), samples, batch) == pytest.approx(expected, rel=1e-6)


def test_a_disagreement_with_the_trainer_fails(tmp_path: Path) -> None:
    demo = run.Demo(tmp_path, 4)
    metrics = write_metrics(tmp_path / "m", [1, 2, 3, 4], [4])
    demo.show_results(metrics, 7.6 + 0.5e-4, "")
    for loss in (7.6 + 2e-4, 7.6 - 2e-4, math.nan):
        with pytest.raises(StageFailed, match="disagree"):
            demo.show_results(metrics, loss, "")


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw_loss(write_metrics(tmp_path / "m", [1, 2, 3, 4], [2, 4]), 2, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_tokenizer_and_model_load_in_transformers_and_continue_a_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MixtralForCausalLM

    size = replace(MODEL, vocab_size=300, hidden_size=32, ffn_hidden_size=32, num_layers=2)
    assert train_tokenizer(["some text to learn from, again and again"] * 5, 300, tmp_path) <= 300
    parameters = make_model(size, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "a line\n  with  spaces, café and 日本"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    model = MixtralForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.config.num_local_experts == 4
    assert isinstance(report.continue_text(model, tokenizer, "some text", 5), str)


def test_only_a_folder_of_an_earlier_demo_is_emptied(tmp_path: Path) -> None:
    workdir = run.prepare(tmp_path / "new" / "demo")
    (workdir / "left over").touch()
    run.prepare(workdir)
    assert [path.name for path in workdir.iterdir()] == [run.MARKER]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    for taken in (tmp_path / "mine", tmp_path / "mine" / "thesis"):
        with pytest.raises(StageFailed, match="--workdir"):
            run.prepare(taken)
    assert (tmp_path / "mine" / "thesis").exists()


def test_bad_options_end_with_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--steps", "1"])
    assert stop.value.code == 2
    (tmp_path / "thesis").touch()
    assert run.main(["--workdir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
