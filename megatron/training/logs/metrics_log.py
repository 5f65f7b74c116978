"""The log of a run: what every step and evaluation leaves on the console, in JSON lines and in loggers."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.training.config import LoggingConfig
from megatron.training.logs.loggers import PROJECT, LoggedRun, new_logger
from megatron.training.logs.metrics import Interval, StepRecord, json_values, line, scalars
from megatron.training.logs.sinks import Console, JsonLines, ScalarSink, TensorBoard
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
        folder: Path = Path(),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """`folder` is where loggers keep their files unless told otherwise; `settings` is what they show of the run."""
        self.config = config
        self.interval = Interval(
            total_iterations=total_iterations,
            flops_per_sample_and_rank=flops_per_sample_and_rank,
            peak_tflops=peak_tflops,
        )
        self.console = Console()
        self.json = JsonLines(Path(config.metrics_path), resumed_at) if config.metrics_path else None
        self.loggers: list[ScalarSink] = []
        if config.tensorboard_dir:
            self.loggers.append(TensorBoard(config.tensorboard_dir, resumed_at))
        if config.logger_names:
            place = Path(config.wandb_save_dir) if config.wandb_save_dir else folder / "loggers"
            project = config.wandb_project or PROJECT
            run = LoggedRun(project, config.wandb_exp_name, config.wandb_entity, place, resumed_at, settings or {})
            self.loggers += [new_logger(name, run) for name in config.logger_names if self._is_wanted(name)]

    def _is_wanted(self, name: str) -> bool:
        """Whether to log there: scripts of Megatron-LM name a project whether or not wandb is installed."""
        if self.config.logger or importlib.util.find_spec(name) is not None:
            return True
        self.console.write(f"WARNING: --wandb-project has no effect without the package {name}: pip install {name}")
        return False

    def step(self, record: StepRecord) -> None:
        """Records one iteration; prints the line of an interval at its end."""
        if self.json is not None:
            self.json.write(json_values(record, self.config))
        self.interval.steps.append(record)
        if record.iteration % self.config.log_interval == 0 or record.iteration == self.interval.total_iterations:
            self.console.write(line(self.interval, self.config))
            if slow := slow_ranks(step.averages.busy_seconds for step in self.interval.steps):
                self.console.write(f"WARNING: {slow}")
            self.interval = replace(self.interval, steps=[])
        every = self.config.tensorboard_log_interval or self.config.log_interval
        if self.loggers and (record.iteration % every == 0 or record.iteration == self.interval.total_iterations):
            values = scalars(record, self.config)
            for logger in self.loggers:
                logger.write(record.iteration, values)

    def evaluation(self, split: str, iteration: int, consumed_samples: int, loss: float) -> None:
        """Records the loss on a split."""
        perplexity = math.exp(min(20.0, loss))
        if self.json is not None:
            self.json.write({"iteration": iteration, "consumed_samples": consumed_samples, f"{split}_loss": loss})
        self.console.write(
            f" {split} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
        )
        for logger in self.loggers:
            logger.write(iteration, {f"lm loss {split}": loss, f"lm loss {split} ppl": perplexity})

    def close(self) -> None:
        """Closes the files."""
        if self.json is not None:
            self.json.close()
        for logger in self.loggers:
            logger.close()
