"""The table of metrics: what each is called in every record, and how the log line shows it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from megatron.training.config import LoggingConfig
from megatron.training.logs.averages import StepAverages
from megatron.training.logs.expert_load import ExpertLoad, model_load


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One training iteration."""

    iteration: int
    consumed_samples: int
    averages: StepAverages
    grad_norm: float
    loss_scale: float
    learning_rate: float
    global_batch_size: int
    tokens_per_second: float
    skipped: bool
    overflow_may_be_the_scale: bool
    """Whether a lower loss scale may be the remedy, if skipped."""
    seconds: float

    @cached_property
    def load(self) -> ExpertLoad:
        """The load of all experts of the model."""
        return model_load(self.averages.tokens_per_expert)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The steps since the last log line, and what is known of the whole run."""

    total_iterations: int
    flops_per_sample_and_rank: float
    peak_tflops: float | None = None
    """Of the device, if known."""
    steps: list[StepRecord] = field(default_factory=list)

    def tflops(self) -> float:
        """TFLOP/s of each rank."""
        samples, seconds = _mean(self, lambda step: step.global_batch_size), _mean(self, lambda step: step.seconds)
        return self.flops_per_sample_and_rank * samples / seconds / 1e12

    def mfu(self) -> float | None:
        """The same in percent of the device's peak."""
        return None if self.peak_tflops is None else 100 * self.tflops() / self.peak_tflops


Value = Callable[[StepRecord], Any]


def _last(interval: Interval, value: Value) -> Any:
    return value(interval.steps[-1])


def _total(interval: Interval, value: Value) -> Any:
    return sum(map(value, interval.steps))


def _mean(interval: Interval, value: Value) -> float:
    return sum(map(value, interval.steps)) / len(interval.steps)


def _finite_mean(interval: Interval, value: Value) -> float:
    finite = [step for step in interval.steps if math.isfinite(step.averages.lm_loss)]
    return sum(map(value, finite)) / len(finite) if finite else math.nan


class Metric(NamedTuple):
    """A row of the table."""

    key: str
    """In the JSON lines, of every step; empty for none."""
    scalar: str
    """In TensorBoard, of the last step of an interval; empty for none."""
    value: Value
    place: int = 0
    """Of the column in the log line; 0 for none."""
    column: str = ""
    """Format of that column; may also use `interval`."""
    over: Callable[[Interval, Value], Any] = _last
    """Makes the column's value, of a whole interval; None leaves the column out."""
    flag: str = ""
    """The switch of `LoggingConfig` that it is recorded with, if not always."""
    of_layers: bool = False
    """Whether the scalar is also one of each layer, with --moe-per-layer-logging."""


# In the order of a JSON line. Columns are called as in Megatron-LM where it has them.
# fmt: off
METRICS = (
    Metric("iteration", "", lambda s: s.iteration, 1, "iteration {:8d}/{interval.total_iterations:8d}"),
    Metric("consumed_samples", "", lambda s: s.consumed_samples, 2, "consumed samples: {:12d}"),
    Metric("lm_loss", "lm loss", lambda s: s.averages.lm_loss, 8, "lm loss: {:.6E}", _finite_mean),
    Metric("load_balancing_loss", "load_balancing_loss", lambda s: s.averages.load_balancing_loss,
           9, "load_balancing_loss: {:.6E}", _finite_mean),
    Metric("z_loss", "z_loss", lambda s: s.averages.z_loss),
    Metric("grad_norm", "grad-norm", lambda s: s.grad_norm, 11, "grad norm: {:.3f}"),
    Metric("max_expert_load", "max-expert-load", lambda s: s.load.largest, 14, "max expert load: {:.2f}",
           of_layers=True),
    Metric("expert_load_entropy", "expert-load-entropy", lambda s: s.load.entropy, of_layers=True),
    Metric("dead_experts", "dead-experts", lambda s: s.load.dead, 15, "dead experts: {:3d}", of_layers=True),
    Metric("tokens_per_expert", "", lambda s: s.averages.tokens_per_expert, flag="moe_per_layer_logging"),
    Metric("learning_rate", "learning-rate", lambda s: s.learning_rate, 6, "learning rate: {:.6E}"),
    Metric("loss_scale", "loss-scale", lambda s: s.loss_scale, 10, "loss scale: {:.1f}"),
    Metric("global_batch_size", "batch-size", lambda s: s.global_batch_size, 7, "global batch size: {:5d}"),
    Metric("tokens_per_second", "tokens-per-second", lambda s: s.tokens_per_second),
    Metric("skipped", "", lambda s: s.skipped, 12, "number of skipped iterations: {:3d}", _total),
    Metric("", "", lambda s: not math.isfinite(s.averages.lm_loss), 13, "number of nan iterations: {:3d}", _total),
    Metric("", "", lambda s: s.seconds, 3, "elapsed time per iteration (ms): {:.1f}", lambda i, v: 1000 * _mean(i, v)),
    Metric("", "", lambda s: s.seconds, 4, "throughput per GPU (TFLOP/s/GPU): {:.1f}", lambda i, _: i.tflops(),
           flag="log_throughput"),
    Metric("", "", lambda s: s.seconds, 5, "MFU: {:.1f}%", lambda i, _: i.mfu(), flag="log_throughput"),
)
# fmt: on


def _rows(config: LoggingConfig) -> list[Metric]:
    return [row for row in METRICS if not row.flag or getattr(config, row.flag)]


def json_values(step: StepRecord, config: LoggingConfig) -> dict[str, Any]:
    """The JSON line of a step."""
    return {row.key: row.value(step) for row in _rows(config) if row.key}


def scalars(step: StepRecord, config: LoggingConfig) -> dict[str, float]:
    """The scalars of a step by their names."""
    values = {row.scalar: row.value(step) for row in _rows(config) if row.scalar}
    for number, counts in enumerate(step.averages.tokens_per_expert if config.moe_per_layer_logging else ()):
        layer = replace(step, averages=step.averages._replace(tokens_per_expert=[counts]))
        values |= {f"{row.scalar}/layer {number}": row.value(layer) for row in METRICS if row.of_layers}
    return values


def line(interval: Interval, config: LoggingConfig) -> str:
    """The log line about an interval of one step or more, as Megatron-LM writes it."""
    text = f" [{time.strftime('%Y-%m-%d %H:%M:%S')}]"
    for row in sorted((row for row in _rows(config) if row.place), key=lambda row: row.place):
        value = row.over(interval, row.value)
        text += "" if value is None else f" {row.column.format(value, interval=interval)} |"
    return text
