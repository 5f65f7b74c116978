"""Weights & Biases, MLflow and trackio get TensorBoard's numbers, go on with the same run, and stop no training."""

import importlib.util
import sqlite3
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_metrics import _record

from megatron.training.config import LoggingConfig
from megatron.training.logs.metrics import scalars
from megatron.training.logs.metrics_log import MetricsLog

NAMES = ("wandb", "mlflow", "trackio")
SETTINGS = {"training": {"seed": 7}, "data": {"data_path": ("a", "b")}}


class Recorder:
    """Stands for any of the three packages: remembers what its functions were given."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = 0
        self.broken = False

    def init(self, **given: Any) -> "Recorder":
        if self.broken:
            raise ConnectionError("no server")
        self.begun.append(given)
        return self

    def start_run(self, run_id: str | None, run_name: str | None) -> SimpleNamespace:
        self.init(id=run_id or "made", name=run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "made"))

    def log(self, values: dict[str, float], step: int, **_: Any) -> None:
        if self.broken:
            raise ConnectionError("no server")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended += 1

    def module(self, name: str) -> ModuleType:
        made = ModuleType(name)
        for own in ("init", "start_run", "log", "finish"):
            setattr(made, own, getattr(self, own))
        made.log_metrics, made.end_run = self.log, self.finish  # type: ignore[attr-defined]
        made.is_tracking_uri_set = lambda: True  # type: ignore[attr-defined]
        for ignored in ("set_experiment", "log_dict", "flush_async_logging"):
            setattr(made, ignored, lambda *_: None)
        return made


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for name in NAMES:
        monkeypatch.setitem(sys.modules, name, made.module(name))
    return made


def log_of(folder: Path, resumed_at: int, **settings: Any) -> MetricsLog:
    config = LoggingConfig(log_interval=1, **settings)
    return MetricsLog(
        config, total_iterations=100, flops_per_sample_and_rank=1.0, resumed_at=resumed_at, folder=folder,
        settings=SETTINGS,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_gets_all_scalars_and_a_resumed_run_is_the_same(name: str, recorder: Recorder, tmp_path: Path) -> None:
    for resumed_at in (0, 2):
        log = log_of(tmp_path, resumed_at, logger=(name,), wandb_exp_name="mine")
        log.step(_record(resumed_at + 1))
        log.evaluation("validation", resumed_at + 1, 8, 2.5)
        log.close()
    identities = [given["name" if name == "trackio" else "id"] for given in recorder.begun]
    assert len(identities) == 2 and identities[0] == identities[1] and recorder.ended == 2
    expected = scalars(_record(1), LoggingConfig())
    assert recorder.logged[0] == (1, expected) and recorder.logged[2] == (3, expected)
    assert recorder.logged[1] == (1, {"lm loss validation": 2.5, "lm loss validation ppl": pytest.approx(12.18, 1e-3)})
    if name != "mlflow":
        assert recorder.begun[0]["config"] == {"training": {"seed": 7}, "data": {"data_path": ["a", "b"]}}
        assert recorder.begun[0]["project"] == "mixtral"
    if name == "wandb":
        log = log_of(tmp_path, 0, logger=(name,))
        log.step(_record(1))
        assert recorder.begun[-1]["id"] != identities[0], "a new run in the same folder"


@pytest.mark.parametrize("name", NAMES)
def test_a_logger_that_fails_is_tried_again_and_stops_nothing(
    name: str, recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.broken = True
    log = log_of(tmp_path, 0, logger=(name,))
    log.step(_record(1))
    log.step(_record(2))
    recorder.broken = False
    log.step(_record(3))
    recorder.broken = True
    log.step(_record(4))
    log.close()
    told = capsys.readouterr().err
    assert [step for step, _ in recorder.logged] == [3]
    assert told.count(f"records for --logger {name} are dropped while they cannot be written: no server") == 2
    assert f"--logger {name} can be written again; 2 record(s) were dropped" in told


def test_one_that_never_began_is_not_ended(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    recorder.broken = True
    log = log_of(tmp_path, 0, wandb_project="p")
    log.step(_record(1))
    log.close()
    assert recorder.ended == 0


def test_flags(
    recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert LoggingConfig().logger_names == ()
    assert LoggingConfig(wandb_project="p").logger_names == ("wandb",)
    assert LoggingConfig(wandb_project="p", logger=("mlflow", "mlflow")).logger_names == ("mlflow",)
    with pytest.raises(ValueError, match="--logger comet: there is no such logger; choose from wandb"):
        LoggingConfig(logger=("comet",))
    with pytest.raises(ValueError, match="--tensorboard-log-interval must be positive, got 0"):
        LoggingConfig(tensorboard_log_interval=0)
    log = log_of(tmp_path, 0, wandb_project="p", tensorboard_log_interval=3, wandb_save_dir=str(tmp_path / "there"))
    for iteration in range(1, 8):
        log.step(_record(iteration))
    assert [step for step, _ in recorder.logged] == [3, 6]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["wandb_run"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert log_of(tmp_path, 0, wandb_project="p").loggers == []
    assert "WARNING: --wandb-project has no effect without the package wandb" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="--logger trackio needs the package trackio: pip install trackio"):
        log_of(tmp_path, 0, logger=("trackio",))


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed_at in (0, 1):
        log = log_of(tmp_path, resumed_at, wandb_project="p")
        log.step(_record(resumed_at + 1))
        log.close()
        assert not log.loggers[0].dropped
    runs = list((tmp_path / "loggers" / "wandb").glob("offline-run-*"))
    identity = (tmp_path / "loggers" / "wandb_run").read_text()
    assert runs and all(run.name.endswith(identity) for run in runs)


@pytest.mark.slow
def test_mlflow_in_a_data_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    for resumed_at in (0, 1):
        log = log_of(tmp_path, resumed_at, logger=("mlflow",), wandb_project="p")
        log.step(_record(resumed_at + 1))
        log.close()
        assert not log.loggers[0].dropped
    with sqlite3.connect(tmp_path / "loggers" / "mlflow.db") as base:
        rows = base.execute("select step, value, run_uuid from metrics where key = 'lm loss' order by step").fetchall()
    identity = (tmp_path / "loggers" / "mlflow_run").read_text()
    assert rows == [(1, 2.0, identity), (2, 2.0, identity)]
    assert not (tmp_path / "mlruns").exists()
