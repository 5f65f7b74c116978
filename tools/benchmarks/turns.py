"""Processes that take steps in turns, and the numbers of a comparison."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.benchmarks.contestants import StepShape

_SCRIPT = Path(__file__).with_name("contestants.py")


class ContestantFailed(RuntimeError):
    """A contestant's process ended; the message is the last thing it said."""


class ContestantProcess:
    """A contestant in its own process. Raises ContestantFailed if it cannot be built, or ends."""

    def __init__(self, kind: str, argument: str, shape: StepShape) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        self._process = subprocess.Popen([sys.executable, str(_SCRIPT)], **pipes, text=True, bufsize=1)
        ready = self.ask(json.dumps({"kind": kind, "argument": argument, "shape": asdict(shape)}))
        self.parameters, self.threads = ready["parameters"], ready["threads"]

    def ask(self, line: str) -> dict[str, Any]:
        """Sends a line, and waits for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._said.seek(0)
            lines = [line for line in self._said.read().splitlines() if line.strip()]
            raise ContestantFailed(lines[-1] if lines else f"ended with status {self._process.returncode}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None and self._process.poll() is None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def spread(values: Sequence[float], form: str) -> str:
    """Median (lowest to highest), each written in `form`."""
    parts = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(format(part, form) for part in parts))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Those of each round, since a machine that drifts does so for both."""
    return [a / b for a, b in zip(above, below, strict=True)]
