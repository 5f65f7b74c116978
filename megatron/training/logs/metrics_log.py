"""The log of a run: what every step and evaluation leaves on the console, in JSON lines and in TensorBoard."""

import math
from dataclasses import replace
from pathlib import Path

from megatron.training.config import LoggingConfig
from megatron.training.logs.metrics import Interval, StepRecord, json_values, line, scalars
from megatron.training.logs.sinks import Console, JsonLines, TensorBoard
from megatron.training.logs.stragglers import slow_ranks


class MetricsLog:
    """Passes records on to the sinks; only the first rank makes one."""

    def __init__(
        self,
        config: LoggingConfig,
        *,
        total_iterations: int,
        flops_per_sample_and_rank: float,
        resumed_at: int | None,
        peak_tflops: float | None = None,
    ) -> None:
        self.config = config
        self.interval = Interval(
            total_iterations=total_iterations,
            flops_per_sample_and_rank=flops_per_sample_and_rank,
            peak_tflops=peak_tflops,
        )
        self.console = Console()
        self.json = JsonLines(Path(config.metrics_path), resumed_at) if config.metrics_path else None
        self.tensorboard = TensorBoard(config.tensorboard_dir, resumed_at) if config.tensorboard_dir else None

    def step(self, record: StepRecord) -> None:
        """Records one iteration; prints the line of an interval at its end."""
        if self.json is not None:
            self.json.write(json_values(record, self.config))
        self.interval.steps.append(record)
        if record.iteration % self.config.log_interval == 0 or record.iteration == self.interval.total_iterations:
            self.console.write(line(self.interval, self.config))
            if slow := slow_ranks(step.averages.busy_seconds for step in self.interval.steps):
                self.console.write(f"WARNING: {slow}")
            if self.tensorboard is not None:
                self.tensorboard.write(record.iteration, scalars(record, self.config))
            self.interval = replace(self.interval, steps=[])

    def evaluation(self, split: str, iteration: int, consumed_samples: int, loss: float) -> None:
        """Records the loss on a split."""
        perplexity = math.exp(min(20.0, loss))
        if self.json is not None:
            self.json.write({"iteration": iteration, "consumed_samples": consumed_samples, f"{split}_loss": loss})
        self.console.write(
            f" {split} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
        )
        if self.tensorboard is not None:
            self.tensorboard.write(iteration, {f"lm loss {split}": loss, f"lm loss {split} ppl": perplexity})

    def close(self) -> None:
        """Closes the files."""
        for sink in (self.json, self.tensorboard):
            if sink is not None:
                sink.close()
