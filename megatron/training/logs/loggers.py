"""Loggers that are packages of their own: which there are, and what they are given.

They get the scalars that TensorBoard gets. One that fails, because its server is away for example, stops no training.
"""

import importlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from megatron.core.atomic_files import atomic_writer
from megatron.training.logs.sinks import ScalarSink

PROJECT = "mixtral"
"""The project of a run that names none."""


class LoggedRun(NamedTuple):
    """What a logger knows of the run."""

    project: str
    name: str | None
    entity: str | None
    folder: Path
    """For its files."""
    resumed_at: int | None
    """The iteration the run goes on from; 0 for a new one."""
    settings: Mapping[str, Any]


def new_logger(name: str, run: LoggedRun) -> ScalarSink:
    """The logger of a name of `--logger`. Raises ValueError if its package is not installed."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--logger {name} needs the package {name}: pip install {name}") from error
    made = importlib.import_module(f"megatron.training.logs.{name}_logger")
    run.folder.mkdir(parents=True, exist_ok=True)
    return cast(ScalarSink, made.Logger(run))


class PackageLogger(ScalarSink):
    """One that begins when the first scalars come, so that it is tried again where it could not."""

    failures = (Exception,)
    package: str

    def __init__(self, run: LoggedRun) -> None:
        self.target = f"--logger {self.package}"
        self._run = run
        self._module: Any = importlib.import_module(self.package)
        self._begun = False

    def _write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if not self._begun:
            self._begin()
            self._begun = True
        self._log(iteration, scalars)

    def close(self) -> None:
        """Ends the run, if it has begun."""
        if self._begun:
            super().close()

    @abstractmethod
    def _begin(self) -> None:
        """Makes the run, or goes on with that of an earlier start."""

    @abstractmethod
    def _log(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    def _earlier(self) -> str | None:
        """The identity of the run that is resumed, if it was kept."""
        path = self._identity_file
        return path.read_text().strip() if self._run.resumed_at != 0 and path.exists() else None

    def _keep(self, identity: str) -> None:
        """Keeps the identity for the run that resumes this one."""
        with atomic_writer(self._identity_file) as file:
            file.write(identity.encode())

    def _identity(self, new: str) -> str:
        """That of the run that is resumed, or the new one, which is kept."""
        identity = self._earlier()
        if identity is None:
            self._keep(identity := new)
        return identity

    @property
    def _identity_file(self) -> Path:
        return self._run.folder / f"{self.package}_run"

    def _settings(self) -> dict[str, Any]:
        """The settings by section, as values of JSON."""
        return cast(dict[str, Any], json.loads(json.dumps(self._run.settings, default=str)))
