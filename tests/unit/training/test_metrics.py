"""The console line people grep, JSON lines that survive a restart, TensorBoard events, averages over a step."""

import errno
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from model_testing import TINY_MODEL

from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.training.config import LoggingConfig
from megatron.training.expert_load import layer_load, model_load
from megatron.training.metrics import MetricsLog, MicrobatchResult, StepRecord, average_over_ranks, slow_ranks
from megatron.training.peak import peak_tflops

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
        lm_loss=loss,
        load_balancing_loss=1.0625,
        z_loss=3.0,
        tokens_per_expert=[[4, 4, 4, 4], [0, 10, 4, 2]],
        grad_norm=0.5,
        loss_scale=1.0,
        learning_rate=1e-3,
        global_batch_size=8,
        tokens_per_second=100.0,
        skipped=skipped,
        blames_scale=False,
        seconds=0.5,
        busy_seconds=busy or [0.4],
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
    assert slow_ranks([_record(1, busy=[0.01, 0.1])]) == ""  # too short to mean anything
    assert slow_ranks([_record(1, busy=[0.4])]) == ""
    assert slow_ranks([_record(1, busy=[0.5, 0.1])]).startswith("rank 0 is slow")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert warnings == ["WARNING: rank 1 is slow: it works 0.40 s in a step, the others typically 0.12 s"]


def test_the_others_median_is_that_of_each_rank_without_it() -> None:
    random = np.random.default_rng(0)
    for ranks in (2, 3, 4, 5, 8, 33):
        busy = random.integers(0, 4, ranks).astype(float).tolist()  # with equal ones
        busy[ranks // 2] += 20
        found = {int(rank): float(typical) for rank, typical in _SLOW.findall(slow_ranks([_record(1, busy=busy)]))}
        typical = [statistics.median(busy[:rank] + busy[rank + 1 :]) for rank in range(ranks)]
        slow = [rank for rank in range(ranks) if busy[rank] > 3 * typical[rank] and busy[rank] > typical[rank] + 0.2]
        assert found == {rank: typical[rank] for rank in slow[:8]} and slow


def test_a_job_of_thousands_is_judged_in_one_line() -> None:
    busy = [1.0] * 4000 + [9.0] * 96
    sentence = slow_ranks([_record(1, busy=busy)])
    assert len(_SLOW.findall(sentence)) == 8 and sentence.endswith("; and 88 more")


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
    log.json_file = disk = _Disk(room=10_000)
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
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = _log()
    log.tensorboard = SimpleNamespace(add_scalar=fail, close=fail)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=fail, flush=fail))
    log.step(_record(100))
    log.evaluation("validation", 100, 800, 2.5)
    log.close()
    told = capsys.readouterr().err
    assert told.count("standard output are dropped") == told.count("--tensorboard-dir are dropped") == 1
