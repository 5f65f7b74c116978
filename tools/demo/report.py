"""What the demo shows at its end: the loss curve, the trained model against the trainer, a continuation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.demo.console import StageFailed


@dataclass(frozen=True)
class Metrics:
    """The numbers of a run, as --metrics-path wrote them."""

    steps: list[tuple[int, float]]
    """Iteration and training loss."""
    evaluations: list[tuple[int, float]]
    """Iteration and validation loss."""
    tokens_per_second: list[float]
    """Of each step."""


def read_metrics(path: Path) -> Metrics:
    """Reads what is in the file so far; a last line that is still being written is left out."""
    metrics = Metrics([], [], [])
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "lm_loss" in record:
            metrics.steps.append((record["iteration"], record["lm_loss"]))
            metrics.tokens_per_second.append(record["tokens_per_second"])
        elif "validation_loss" in record:
            metrics.evaluations.append((record["iteration"], record["validation_loss"]))
    return metrics


def check_run(metrics: Metrics, last: int) -> None:
    """Raises StageFailed unless the steps are 1, 2, ..., `last`, each once, and the last one was evaluated."""
    iterations = [iteration for iteration, _ in metrics.steps]
    if iterations != list(range(1, last + 1)):
        raise StageFailed(f"iterations 1 to {last} should have been taken once each, but these were: {iterations}")
    if not metrics.evaluations or metrics.evaluations[-1][0] != last:
        raise StageFailed(f"the trainer did not evaluate after its last iteration, {last}: {metrics.evaluations}")


def draw_loss(metrics: Metrics, resumed_at: int, path: Path) -> None:
    """Saves a picture of the loss curve as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(*zip(*metrics.steps, strict=True), color="#4c72b0", linewidth=1.4, label="training")
    axes.plot(*zip(*metrics.evaluations, strict=True), "o", color="#c44e52", markersize=6, label="validation")
    axes.axvline(resumed_at + 0.5, color="#555555", linestyle="--", linewidth=1)
    axes.annotate(
        "stopped and resumed", xy=(resumed_at + 0.5, 0.97), xycoords=("data", "axes fraction"), xytext=(5, 0),
        textcoords="offset points", va="top", color="#555555",
    )  # fmt: skip
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Mixtral, 4 experts, tensor parallel 2 x pipeline parallel 2 on four CPU processes", fontsize=11)
    axes.set_xlim(0, metrics.steps[-1][0] + 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def validation_samples(
    data_path: Sequence[str], *, split: str, seq_length: int, seed: int, train_samples: int, count: int,
    tokenizer: Path, cache: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """The first `count` samples of the validation split, the ones the trainer evaluates."""
    from megatron.core.config import DataConfig, TokenizerConfig
    from megatron.core.datasets.blended_dataset import build_train_valid_test_datasets
    from megatron.core.tokenizers import build_tokenizer

    settings = TokenizerConfig(tokenizer_type="PretrainedTokenizerFromHF", tokenizer_model=str(tokenizer))
    data = DataConfig(data_path=tuple(data_path), split=split, seq_length=seq_length, data_cache_path=str(cache))
    _, validation, _ = build_train_valid_test_datasets(
        data, (train_samples, count, count), seed, build_tokenizer(settings)
    )
    assert validation is not None
    return [validation[index] for index in range(count)]


def transformers_loss(model: Any, samples: Sequence[dict[str, Any]], batch: int = 8) -> float:
    """Mean loss of a transformers model over the tokens of `samples` whose loss mask is 1, in nats."""
    import numpy
    import torch

    total = count = 0.0
    with torch.no_grad():
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            tokens, labels, mask = (
                torch.from_numpy(numpy.stack([numpy.asarray(sample[name]) for sample in part]))
                for name in ("tokens", "labels", "loss_mask")
            )
            logits = model(input_ids=tokens).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += float((losses.double() * mask.flatten()).sum())
            count += float(mask.sum())
    return total / count


def continue_text(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The prompt's most likely continuation, without repeating a run of three tokens."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=tokens, do_sample=False,
        no_repeat_ngram_size=3, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
