"""What all parts are given: the machine, the time that is left, and a way to run commands within it."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tools.gpu_checks.commands import ROOT, TORCHRUN, Ran, run_together
from tools.gpu_checks.report import Part, Status

Device = Literal["cuda", "cpu"]
GIB = 2**30
_CPU_RANKS = 2


class PartEnded(Exception):
    """A part is over before its end; `status` and the sentence say how."""

    def __init__(self, status: Status, sentence: str) -> None:
        super().__init__(sentence)
        self.status: Status = status


@dataclass(frozen=True)
class Machine:
    """What the probe found."""

    python: str
    torch: str
    cuda: str | None
    nccl: str | None
    system: str
    gpus: list[dict[str, Any]]
    """name, capability, and total and free memory in bytes."""
    packages: dict[str, str | None]
    compiler: str
    python_headers: bool

    @property
    def line(self) -> str:
        """Device and versions."""
        name = f"{len(self.gpus)} x {self.gpus[0]['name']}" if self.gpus else "no GPU"
        versions = f"torch {self.torch}, Triton {self.packages['triton'] or 'missing'}, Python {self.python}"
        return f"{name}, {os.cpu_count()} cores; {versions}"

    def ranks(self, device: Device) -> int:
        """Processes that a job on this machine can have."""
        return len(self.gpus) if device == "cuda" else _CPU_RANKS


def probe(seconds: float) -> Machine:
    """Asks torch in a separate process. Raises ValueError if it cannot be imported or does not answer."""
    (ran,) = run_together([[sys.executable, "-m", "tools.gpu_checks.probe"]], seconds)
    lines = ran.output.strip().splitlines()
    if ran.status != 0 or not lines:
        raise ValueError(f"torch cannot be asked about this machine ({ran.ending}): {ran.last_words or 'no answer'}")
    return Machine(**json.loads(lines[-1]))


class Session:
    """A part's commands, which end with its time."""

    def __init__(self, device: Device, machine: Machine, part: Part, seconds: float) -> None:
        self.device, self.machine, self.part = device, machine, part
        self._deadline = time.monotonic() + seconds
        # a trial on a CPU shares it with others, where threads that wait for each other take many times as long
        self._threads = 1 if device == "cpu" else max(1, (os.cpu_count() or 1) // max(4, len(machine.gpus)))

    @property
    def seconds_left(self) -> float:
        """Of the part."""
        return self._deadline - time.monotonic()

    def run_together(
        self, commands: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None, at_most: float = math.inf
    ) -> list[Ran]:
        """Runs commands at the same time, for `at_most` seconds and as long as the part has time, and records them.

        Raises PartEnded if the part has no time left.
        """
        if self.seconds_left < 1:
            raise PartEnded("unfinished", "the time was over before all of it had run")
        variables = {"OMP_NUM_THREADS": str(self._threads), **(environment or {})}
        done = run_together(commands, min(at_most, self.seconds_left), variables)
        for ran in done:
            self.part.ran(ran)
        return done

    def run(self, words: Sequence[str], environment: Mapping[str, str] | None = None, at_most: float = math.inf) -> Ran:
        """Runs one command and records it."""
        return self.run_together([words], environment, at_most)[0]

    def python(self, script: str, *arguments: object, ranks: int = 0) -> list[str]:
        """The words that start a script or a module of this project, under torchrun if there are ranks."""
        start = [*TORCHRUN, "--nproc-per-node", str(ranks)] if ranks else [sys.executable]
        program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
        return [*start, *program, *map(str, arguments)]

    def needs(self, *packages: str) -> None:
        """Raises PartEnded with the status skipped if one of these packages is not installed."""
        for package in packages:
            if self.machine.packages.get(package) is None:
                raise PartEnded("skipped", f"{package} is not installed")


def must_end_well(ran: Ran) -> Ran:
    """Raises PartEnded if a command was stopped or failed."""
    if ran.status is None:
        raise PartEnded("unfinished", f"{ran.name} was {ran.ending}")
    if ran.status != 0:
        raise PartEnded("failed", f"{ran.name} {ran.ending}: {ran.last_words}")
    return ran
