"""The console line people grep, JSON lines that survive a restart, TensorBoard events, averages over a step."""

import errno
import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_testing import TINY_MODEL

from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.training.config import LoggingConfig
from megatron.training.logs.averages import MicrobatchResult, StepAverages, average_over_ranks
from megatron.training.logs.expert_load import layer_load, model_load
from megatron.training.logs.metrics import METRICS, StepRecord
from megatron.training.logs.metrics_log import MetricsLog
from megatron.training.logs.peak import peak_tflops
from megatron.training.logs.stragglers import slow_ranks

LINE = re.compile(
    r"^ \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(\d+)/ +(\d+) \| consumed samples: +\d+ \| "
    r"elapsed time per iteration \(ms\): [\d.]+ \| throughput per GPU \(TFLOP/s/GPU\): ([\d.]+) \| "
    r"learning rate: ([\d.E+-]+) \| global batch size: +(\d+) \| lm loss: ([\d.E+-]+) \| "
    r"load_balancing_loss: ([\d.E+-]+) \| loss scale: 1.0 \| grad norm: ([\d.]+) \| "
    r"number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \| "
    r"max expert load: 2.50 \| dead experts:   1 \|$"
)

_SLOW = re.compile(r"rank (\d+) is slow: it works [\d.]+ s in a step, the others typically ([\d.]+) s")


def _record(iteration: int, loss: float = 2.0, skipped: bool = False, busy: list[float] | None = None) -> StepRecord:
    return StepRecord(
        iteration=iteration,
        consumed_samples=8 * iteration,
        averages=StepAverages(loss, 1.0625, 3.0, [[4, 4, 4, 4], [0, 10, 4, 2]], False, busy or [0.4]),
        grad_norm=0.5,
        loss_scale=1.0,
        learning_rate=1e-3,
        global_batch_size=8,
        tokens_per_second=100.0,
        skipped=skipped,
        overflow_may_be_the_scale=False,
        seconds=0.5,
    )


def _log(resumed_at: int = 0, **settings: object) -> MetricsLog:
    config = LoggingConfig(**settings)  # type: ignore[arg-type]
    return MetricsLog(config, total_iterations=100, flops_per_sample_and_rank=2.5e11, resumed_at=resumed_at)


def test_the_console_line_is_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(log_interval=3, log_throughput=True)
    for record in (_record(1, 3.0), _record(2, 1.0), _record(3, math.nan, skipped=True), _record(4)):
        log.step(record)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    match = LINE.match(lines[0])
    assert match, lines[0]
    assert match.groups() == (
        "3", "100", "4.0", "1.000000E-03", "8", "2.000000E+00", "1.062500E+00", "0.500", "1", "1",
    )  # fmt: skip


# What the records of two steps, of which the first one's loss is NaN, and an evaluation leave behind.
JSON_LINES = """\
{"iteration": 1, "consumed_samples": 8, "lm_loss": NaN, "load_balancing_loss": 1.0625, "z_loss": 3.0, \
"grad_norm": 0.5, "max_expert_load": 2.5, "expert_load_entropy": 0.8246987351738497, "dead_experts": 1, \
"tokens_per_expert": [[4, 4, 4, 4], [0, 10, 4, 2]], "learning_rate": 0.001, "loss_scale": 1.0, \
"global_batch_size": 8, "tokens_per_second": 100.0, "skipped": true}
{"iteration": 2, "consumed_samples": 16, "lm_loss": 0.3333333333333333, "load_balancing_loss": 1.0625, "z_loss": 3.0, \
"grad_norm": 0.5, "max_expert_load": 2.5, "expert_load_entropy": 0.8246987351738497, "dead_experts": 1, \
"tokens_per_expert": [[4, 4, 4, 4], [0, 10, 4, 2]], "learning_rate": 0.001, "loss_scale": 1.0, \
"global_batch_size": 8, "tokens_per_second": 100.0, "skipped": false}
{"iteration": 2, "consumed_samples": 16, "validation_loss": 2.5}
"""
LINES = """\
] iteration        2/     100 | consumed samples:           16 | elapsed time per iteration (ms): 500.0 | \
throughput per GPU (TFLOP/s/GPU): 4.0 | MFU: 40.0% | learning rate: 1.000000E-03 | global batch size:     8 | \
lm loss: 3.333333E-01 | load_balancing_loss: 1.062500E+00 | loss scale: 1.0 | grad norm: 0.500 | \
number of skipped iterations:   1 | number of nan iterations:   1 | max expert load: 2.50 | dead experts:   1 |
 validation loss at iteration 2 | lm loss value: 2.500000E+00 | lm loss PPL: 1.218249E+01 |
"""
SCALARS = {
    "lm loss": 1 / 3,
    "load_balancing_loss": 1.0625,
    "z_loss": 3.0,
    "max-expert-load": 2.5,
    "expert-load-entropy": 0.8246987351738497,
    "dead-experts": 1,
    "grad-norm": 0.5,
    "learning-rate": 1e-3,
    "loss-scale": 1.0,
    "batch-size": 8,
    "tokens-per-second": 100.0,
    "max-expert-load/layer 0": 1.0,
    "expert-load-entropy/layer 0": 1.0,
    "dead-experts/layer 0": 0,
    "max-expert-load/layer 1": 2.5,
    "expert-load-entropy/layer 1": 0.6493974703476994,
    "dead-experts/layer 1": 1,
    "lm loss validation": 2.5,
    "lm loss validation ppl": math.exp(2.5),
}


@pytest.mark.parametrize("everything", [True, False])
def test_what_is_written_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], everything: bool) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    json_lines, lines, scalars = JSON_LINES, LINES, SCALARS
    if not everything:
        json_lines = re.sub(r'"tokens_per_expert": .*?]], ', "", json_lines)
        lines = re.sub(r"throughput.*?% \| ", "", lines)
        scalars = {name: value for name, value in scalars.items() if "/layer" not in name}
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    config = LoggingConfig(
        log_interval=2,
        log_throughput=everything,
        moe_per_layer_logging=everything,
        metrics_path=str(path),
        tensorboard_dir=str(folder),
    )
    log = MetricsLog(config, total_iterations=100, flops_per_sample_and_rank=2.5e11, resumed_at=0, peak_tflops=10.0)
    log.step(_record(1, math.nan, skipped=True))
    log.step(_record(2, 1 / 3))
    log.evaluation("validation", 2, 16, 2.5)
    log.close()
    assert path.read_text() == json_lines
    assert re.sub(r"^ \[[-\d]{10} [:\d]{8}", "", capsys.readouterr().out) == lines
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    found = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [(2, pytest.approx(value, rel=1e-6))] for name, value in scalars.items()}


@pytest.mark.parametrize("name", ["key", "scalar", "place"])
def test_no_row_of_the_table_hides_another(name: str) -> None:
    given = [getattr(row, name) for row in METRICS if getattr(row, name)]
    assert len(given) == len(set(given)) > 10
    assert all(bool(row.place) == bool(row.column) for row in METRICS)


def test_mfu_is_the_share_of_a_known_peak(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def line(peak: float | None) -> str:
        config = LoggingConfig(log_interval=1, log_throughput=True)
        log = MetricsLog(config, total_iterations=100, flops_per_sample_and_rank=2.5e11, resumed_at=0, peak_tflops=peak)
        log.step(_record(1))
        return capsys.readouterr().out

    # 8 samples of 0.25 TFLOP in 0.5 s
    assert "throughput per GPU (TFLOP/s/GPU): 4.0 | MFU: 40.0% | learning rate" in line(10.0)
    assert "MFU" not in line(None)
    names = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA L40S": 362.0, "another": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_tflops(torch.device("cuda"), torch.bfloat16) == peak
        assert peak_tflops(torch.device("cuda"), torch.float32) is None
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None


def test_json_lines_are_exact_and_taken_up_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    log = _log(metrics_path=str(path))
    for iteration in range(1, 6):
        log.step(_record(iteration, 1 / 3 + iteration))
    log.evaluation("validation", 5, 40, 2.5)
    log.close()
    with open(path, "a") as file:
        file.write('{"iteration": 6, "lm_l')  # killed while writing
    log = _log(resumed_at=4, metrics_path=str(path))
    log.step(_record(5, 7.0))
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[3]["lm_loss"] == 1 / 3 + 4 and lines[4]["lm_loss"] == 7.0
    names = {"iteration", "consumed_samples", "lm_loss", "load_balancing_loss", "grad_norm", "learning_rate"}
    assert names | {"tokens_per_second"} <= lines[0].keys()


def test_tensorboard_gets_every_logged_number(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = _log(log_interval=1, tensorboard_dir=str(tmp_path), moe_per_layer_logging=True)
    log.step(_record(1))
    log.evaluation("validation", 1, 8, 2.5)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("lm loss")[0].value == 2.0
    assert events.Scalars("lm loss validation")[0].value == 2.5
    assert events.Scalars("load_balancing_loss")[0].value == 1.0625
    assert events.Scalars("max-expert-load")[0].value == 2.5
    assert events.Scalars("max-expert-load/layer 0")[0].value == 1.0
    assert events.Scalars("dead-experts/layer 1")[0].value == 1


def test_averages_are_over_microbatches_and_layers() -> None:
    def result(loss: float, balance: list[float]) -> MicrobatchResult:
        values = torch.tensor(balance)
        counts = torch.tensor([[1.0, 0.0, 2.0, 3.0], [loss, 0.0, 0.0, 0.0]])
        return MicrobatchResult(torch.tensor(loss), RouterStatistics(values, 2 * values, counts), first_layer=1)

    results = [result(1.0, [1.0, 2.0]), result(3.0, [3.0, 6.0])]
    model = replace(TINY_MODEL, num_layers=3)
    averages = average_over_ranks(results, 2, ProcessGroups(), model, torch.device("cpu"), stop=True)
    load = [[0, 0, 0, 0], [2, 0, 4, 6], [4, 0, 0, 0]]
    assert averages == (2.0, 2.0, 4.0, load, True, [0.0])  # the first of the three layers is on another stage


def test_loads_are_relative_to_an_even_share() -> None:
    assert layer_load([5, 5, 5, 5]) == (1.0, pytest.approx(1.0), 0)
    assert layer_load([8, 8, 0, 0]) == (2.0, pytest.approx(0.5), 2)
    assert layer_load([0, 0, 0, 7]) == (4.0, 0.0, 3)
    assert layer_load([0, 0]).dead == 2
    assert model_load([[5, 5], [0, 2]]) == (2.0, pytest.approx(0.5), 1)


def test_slow_ranks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(log_interval=2)
    for record in (_record(1, busy=[0.1, 0.4, 0.15, 0.1]), _record(2, busy=[0.1, 0.4, 0.1, 0.3])):
        log.step(record)
    assert slow_ranks([[0.01, 0.1]]) == ""  # too short to mean anything
    assert slow_ranks([[0.4]]) == ""
    assert slow_ranks([[0.5, 0.1]]).startswith("rank 0 is slow")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == ["WARNING: rank 1 is slow: it works 0.40 s in a step, the others typically 0.12 s"]


def test_a_slow_rank_is_compared_with_the_median_of_the_others() -> None:
    generator = random.Random(0)
    for ranks in (*range(2, 9), 101):
        for _ in range(50):
            busy = [generator.choice((0.1, 0.2, 0.25, 1.0, generator.random())) for _ in range(ranks)]
            medians = [statistics.median(busy[:rank] + busy[rank + 1 :]) for rank in range(ranks)]
            sentences = [
                f"rank {rank} is slow: it works {own:.2f} s in a step, the others typically {median:.2f} s"
                for rank, (own, median) in enumerate(zip(busy, medians, strict=True))
                if own > 3 * median and own - median > 0.2
            ]
            more = f"; and {len(sentences) - 8} more" if len(sentences) > 8 else ""
            assert slow_ranks([busy]) == "; ".join(sentences[:8]) + more


RANKS = 4096


class _Compared(float):
    """A number that counts how often it is compared, of a list that may be sorted twice."""

    count = 0

    def __lt__(self, other: float) -> bool:
        _Compared.count += 1
        assert _Compared.count < 40 * RANKS, "not by sorting"
        return float(self) < float(other)

    def __radd__(self, other: float) -> "_Compared":
        return self


def test_slow_ranks_are_found_among_thousands_by_sorting_once() -> None:
    busy = [_Compared(0.1 + (7919 * rank % RANKS) / RANKS / 10) for rank in range(RANKS)]
    busy[77] = _Compared(5.0)
    assert slow_ranks([busy]).startswith("rank 77 is slow: it works 5.00 s")
    assert _Compared.count > RANKS


def test_a_job_of_thousands_is_judged_in_one_line() -> None:
    sentence = slow_ranks([[1.0] * 4000 + [9.0] * 96])
    assert sentence.count("is slow") == 8 and sentence.endswith("; and 88 more")


class _Disk:
    """A file on a disk with room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room, self.data = room, b""

    def seek(self, offset: int, whence: int) -> int:
        return len(self.data)

    def write(self, line: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = line[: self.room]
        self.data, self.room = self.data + written, self.room - len(written)
        return len(written)

    def truncate(self, size: int) -> None:
        self.room, self.data = self.room + len(self.data) - size, self.data[:size]

    def close(self) -> None:
        pass


def test_a_full_disk_drops_records_and_never_stops_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(metrics_path=str(tmp_path / "metrics.jsonl"))
    log.json.file = disk = _Disk(room=10_000)
    log.step(_record(1))
    disk.room = len(disk.data) * 3 // 2  # a record and a half
    for iteration in range(2, 7):
        log.step(_record(iteration))
    disk.room += 10_000
    log.step(_record(7))
    log.close()
    assert [json.loads(line)["iteration"] for line in disk.data.splitlines()] == [1, 2, 7]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "--metrics-path are dropped" in told[0] and "No space left" in told[0]
    assert told[1] == "--metrics-path can be written again; 4 record(s) were dropped"


def test_a_terminal_and_a_tensorboard_that_fail_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = _log(tensorboard_dir=str(tmp_path))
    log.loggers[0].writer = SimpleNamespace(add_scalar=fail, close=fail)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=fail, flush=fail))
    log.step(_record(100))
    log.evaluation("validation", 100, 800, 2.5)
    log.close()
    told = capsys.readouterr().err
    assert told.count("standard output are dropped") == told.count("--tensorboard-dir are dropped") == 1
