"""Numbers of each step: brought together from all ranks, printed, and recorded."""

import contextlib
import errno
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.atomic_files import atomic_writer
from megatron.core.config import ModelConfig
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.training.config import LoggingConfig
from megatron.training.expert_load import layer_load, model_load

# Ranks that a warning names; more of them are counted.
_MOST_NAMED = 8


class MicrobatchResult(NamedTuple):
    """What is kept of one microbatch on one stage, without gradient."""

    loss: Tensor | None
    """Mean loss of its tokens; on the last stage only."""
    statistics: RouterStatistics
    """Router statistics of the stage's layers."""
    first_layer: int = 0
    """Number of the stage's first layer in the whole model."""


class StepAverages(NamedTuple):
    """Averages over a whole step, the same on every rank."""

    lm_loss: float
    load_balancing_loss: float
    """Mean over layers and microbatches, without coefficient; 1 when balanced."""
    z_loss: float
    tokens_per_expert: list[list[int]]
    """How often each expert of each layer of the model was chosen, in all microbatches of all ranks."""
    stop: bool
    """Whether any rank wants to stop."""
    busy_seconds: list[float]
    """Time in which each rank was not waiting for others."""


def average_over_ranks(
    results: list[MicrobatchResult],
    num_microbatches: int,
    groups: ProcessGroups,
    model: ModelConfig,
    device: torch.device,
    stop: bool = False,
    busy_seconds: float = 0.0,
) -> StepAverages:
    """Averages over microbatches, data-parallel ranks and layers, in one all-reduce of the whole job.

    `results` are those of all `num_microbatches` microbatches in all of the rank's stages.
    """
    chosen = model.num_layers * model.num_experts
    totals = torch.zeros(4 + chosen + groups.world.size, dtype=torch.float64, device=device)
    chosen_LE = totals[4 : 4 + chosen].view(model.num_layers, model.num_experts)
    if groups.tp.is_first:  # tensor-parallel ranks hold the same numbers
        microbatches = num_microbatches * groups.dp_cp.size
        for result in results:
            if result.loss is not None:
                totals[0] += result.loss.double() / microbatches
            totals[1] += result.statistics.load_balancing_loss.double().sum() / (microbatches * model.num_layers)
            totals[2] += result.statistics.z_loss.double().sum() / (microbatches * model.num_layers)
            counts = result.statistics.tokens_per_expert
            # context-parallel ranks hold the same counts, those of the whole microbatch
            chosen_LE[result.first_layer : result.first_layer + len(counts)] += counts / groups.cp.size
    # arguments of kernels; an assignment would copy from the host, which waits for the device
    totals[3].fill_(float(stop))
    totals[4 + chosen + groups.world.rank].fill_(busy_seconds)
    if groups.world.size > 1:
        dist.all_reduce(totals, group=groups.world.handle)
    totals = totals.cpu()  # waits for the device once
    loss, balance, z_loss, stops = totals[:4].tolist()
    counts_by_layer = [
        [round(count) for count in counts]
        for counts in totals[4 : 4 + chosen].view(model.num_layers, model.num_experts).tolist()
    ]
    return StepAverages(loss, balance, z_loss, counts_by_layer, stops > 0, totals[4 + chosen :].tolist())


def slow_ranks(records: Sequence["StepRecord"]) -> str:
    """A sentence about ranks that worked several times longer than the others in these steps; empty without any."""
    totals = [sum(seconds) for seconds in zip(*(record.busy_seconds for record in records), strict=True)]
    # without the longest, so that of two ranks one can be slow; for who is slow it is the median of all others
    typical = statistics.median(sorted(totals)[:-1] or totals)
    sentences = [
        f"rank {rank} is slow: it works {seconds / len(records):.2f} s in a step, the others typically "
        f"{typical / len(records):.2f} s"
        for rank, seconds in enumerate(totals)
        if seconds > 3 * typical and seconds - typical > 0.2
    ]
    more = f"; and {len(sentences) - _MOST_NAMED} more" if len(sentences) > _MOST_NAMED else ""
    return "; ".join(sentences[:_MOST_NAMED]) + more


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One training iteration."""

    iteration: int
    consumed_samples: int
    lm_loss: float
    load_balancing_loss: float
    z_loss: float
    tokens_per_expert: list[list[int]]
    """How often each expert of each layer was chosen."""
    grad_norm: float
    loss_scale: float
    learning_rate: float
    global_batch_size: int
    tokens_per_second: float
    skipped: bool
    blames_scale: bool
    """Whether a lower loss scale may be the remedy, if skipped."""
    seconds: float
    busy_seconds: list[float]
    """Time in which each rank was not waiting for others."""


class MetricsLog:
    """Console, JSON lines and TensorBoard; only the first rank makes one.

    What cannot be written, on a disk that is full for example, is dropped and counted, and never stops the training.
    """

    def __init__(
        self,
        config: LoggingConfig,
        *,
        total_iterations: int,
        flops_per_sample_and_rank: float,
        resumed_at: int | None,
        peak_tflops: float | None = None,
    ) -> None:
        self.config, self.total_iterations = config, total_iterations
        self.flops, self.peak_tflops = flops_per_sample_and_rank, peak_tflops
        self.interval: list[StepRecord] = []
        self.json_file = _open_json_lines(Path(config.metrics_path), resumed_at) if config.metrics_path else None
        self.tensorboard = _tensorboard_writer(config.tensorboard_dir, resumed_at) if config.tensorboard_dir else None
        self.dropped = {"standard output": 0, "--metrics-path": 0, "--tensorboard-dir": 0}

    def step(self, record: StepRecord) -> None:
        """Records one iteration; prints the line of an interval at its end."""
        load = model_load(record.tokens_per_expert)
        by_layer = self.config.moe_per_layer_logging
        self._write_json(
            {
                "iteration": record.iteration,
                "consumed_samples": record.consumed_samples,
                "lm_loss": record.lm_loss,
                "load_balancing_loss": record.load_balancing_loss,
                "z_loss": record.z_loss,
                "grad_norm": record.grad_norm,
                "max_expert_load": load.largest,
                "expert_load_entropy": load.entropy,
                "dead_experts": load.dead,
                **({"tokens_per_expert": record.tokens_per_expert} if by_layer else {}),
                "learning_rate": record.learning_rate,
                "loss_scale": record.loss_scale,
                "global_batch_size": record.global_batch_size,
                "tokens_per_second": record.tokens_per_second,
                "skipped": record.skipped,
            }
        )
        self.interval.append(record)
        if record.iteration % self.config.log_interval == 0 or record.iteration == self.total_iterations:
            self._print(self._line())
            if slow := slow_ranks(self.interval):
                self._print(f"WARNING: {slow}")
            self._tensorboard(
                record.iteration,
                {
                    "lm loss": record.lm_loss,
                    "load_balancing_loss": record.load_balancing_loss,
                    "z_loss": record.z_loss,
                    "max-expert-load": load.largest,
                    "expert-load-entropy": load.entropy,
                    "dead-experts": load.dead,
                    "grad-norm": record.grad_norm,
                    "learning-rate": record.learning_rate,
                    "loss-scale": record.loss_scale,
                    "batch-size": record.global_batch_size,
                    "tokens-per-second": record.tokens_per_second,
                },
            )
            for number, counts in enumerate(record.tokens_per_expert if by_layer else ()):
                layer = layer_load(counts)
                self._tensorboard(
                    record.iteration,
                    {
                        f"max-expert-load/layer {number}": layer.largest,
                        f"expert-load-entropy/layer {number}": layer.entropy,
                        f"dead-experts/layer {number}": layer.dead,
                    },
                )
            self.interval = []

    def evaluation(self, split: str, iteration: int, consumed_samples: int, loss: float) -> None:
        """Records the loss on a split."""
        self._write_json({"iteration": iteration, "consumed_samples": consumed_samples, f"{split}_loss": loss})
        perplexity = math.exp(min(20.0, loss))
        self._print(
            f" {split} loss at iteration {iteration} | lm loss value: {loss:.6E} | lm loss PPL: {perplexity:.6E} |"
        )
        self._tensorboard(iteration, {f"lm loss {split}": loss, f"lm loss {split} ppl": perplexity})

    def close(self) -> None:
        """Closes the files."""
        if self.json_file is not None:
            self.json_file.close()
        if self.tensorboard is not None:
            self._attempt("--tensorboard-dir", self.tensorboard.close)

    def _line(self) -> str:
        """Megatron-LM's line: averages over the interval's steps; rate, gradient norm and expert load of the last."""
        records, last = self.interval, self.interval[-1]
        finite = [record for record in records if math.isfinite(record.lm_loss)]

        def mean(name: str) -> float:
            return sum(getattr(record, name) for record in finite) / len(finite) if finite else math.nan

        seconds = sum(record.seconds for record in records) / len(records)
        load = model_load(last.tokens_per_expert)
        samples = sum(record.global_batch_size for record in records) / len(records)
        tflops = self.flops * samples / seconds / 1e12
        throughput = f" throughput per GPU (TFLOP/s/GPU): {tflops:.1f} |"
        if self.peak_tflops is not None:
            throughput += f" MFU: {100 * tflops / self.peak_tflops:.1f}% |"
        return (
            f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] iteration {last.iteration:8d}/{self.total_iterations:8d} |"
            f" consumed samples: {last.consumed_samples:12d} |"
            f" elapsed time per iteration (ms): {seconds * 1000:.1f} |"
            f"{throughput if self.config.log_throughput else ''}"
            f" learning rate: {last.learning_rate:.6E} | global batch size: {last.global_batch_size:5d} |"
            f" lm loss: {mean('lm_loss'):.6E} | load_balancing_loss: {mean('load_balancing_loss'):.6E} |"
            f" loss scale: {last.loss_scale:.1f} | grad norm: {last.grad_norm:.3f} |"
            f" number of skipped iterations: {sum(record.skipped for record in records):3d} |"
            f" number of nan iterations: {len(records) - len(finite):3d} |"
            f" max expert load: {load.largest:.2f} | dead experts: {load.dead:3d} |"
        )

    def _write_json(self, values: dict[str, Any]) -> None:
        if self.json_file is not None:
            file, line = self.json_file, json.dumps(values) + "\n"
            self._attempt("--metrics-path", lambda: _append(file, line.encode()))

    def _tensorboard(self, iteration: int, values: dict[str, float]) -> None:
        writer = self.tensorboard
        if writer is not None:
            scalars = values.items()
            self._attempt("--tensorboard-dir", lambda: [writer.add_scalar(name, v, iteration) for name, v in scalars])

    def _print(self, line: str) -> None:
        self._attempt("standard output", lambda: print(line, flush=True))

    def _attempt(self, target: str, write: Callable[[], object]) -> None:
        """Writes, or drops the record; the first one that is dropped, and the first that is not again, are told."""
        try:
            write()
        except OSError as error:
            if not self.dropped[target]:
                self._warn(f"WARNING: records for {target} are dropped while they cannot be written: {error}")
            self.dropped[target] += 1
        else:
            if count := self.dropped[target]:
                self.dropped[target] = 0
                self._warn(f"{target} can be written again; {count} record(s) were dropped")

    def _warn(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _append(file: Any, line: bytes) -> None:
    """Appends a whole line or nothing to an unbuffered file."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def _open_json_lines(path: Path, resumed_at: int | None) -> Any:
    """Opens for appending, without the lines of steps after `resumed_at`, which will be taken again.

    A run that starts anew keeps what another one wrote there under a numbered name. With None all lines stay.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resumed_at == 0 and path.exists() and path.stat().st_size:  # another run's numbers
        aside = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
    elif resumed_at is not None and path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["iteration"] <= resumed_at else []
            except (ValueError, KeyError, TypeError):  # cut off when the job was killed
                continue
        with atomic_writer(path) as file:
            file.write("".join(line + os.linesep for line in kept).encode())
    return open(path, "ab", buffering=0)


def _tensorboard_writer(folder: str, resumed_at: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard-dir needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=None if resumed_at is None else resumed_at + 1)  # type: ignore[no-untyped-call]
