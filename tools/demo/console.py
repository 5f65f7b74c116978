"""Running the demo's commands: each is printed, logged to a file, and watched by a progress bar."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO


class StageFailed(Exception):
    """A stage of the demo did not do what it should; the message is for the user."""


class Progress:
    """One bar over all stages: redrawn in place on a terminal, a line now and then in a log."""

    def __init__(self, stages: Mapping[str, float], stream: TextIO = sys.stdout) -> None:
        """`stages` are names in order, each with its share of the whole time, in any unit."""
        self.stages = dict(stages)
        self.stream = stream
        self.is_terminal = stream.isatty()
        self.current: str | None = None
        self.fraction = 0.0
        self.note = ""
        self.printed_tenth = 0
        self.start_time = time.monotonic()

    def start(self, stage: str, sentence: str) -> None:
        """Goes on to the next stage; `sentence` says what it does."""
        assert stage in self.stages
        self.current, self.fraction, self.note, self.printed_tenth = stage, 0.0, "", 0
        number = list(self.stages).index(stage) + 1
        self.say(f"\n[{number}/{len(self.stages)}] {sentence}")

    def update(self, fraction: float, note: str) -> None:
        """Sets how much of this stage is done, in [0, 1]."""
        self.fraction, self.note = min(1.0, fraction), note
        if self.is_terminal:
            self._draw()
        elif int(self.fraction * 10) > self.printed_tenth:
            self.printed_tenth = int(self.fraction * 10)
            print(f"  {self.overall():4.0%}  {note}", file=self.stream, flush=True)

    def overall(self) -> float:
        """Share of all stages that is done."""
        total = sum(self.stages.values())
        names = list(self.stages)
        before = sum(self.stages[name] for name in names[: names.index(self.current)]) if self.current else 0.0
        return (before + (self.stages[self.current] * self.fraction if self.current else 0.0)) / total

    def say(self, text: str) -> None:
        """Prints lines above the bar."""
        erase = "\r\x1b[K" if self.is_terminal else ""
        print(f"{erase}{text}", file=self.stream, flush=True)
        if self.is_terminal:
            self._draw()

    def close(self) -> None:
        """Takes the bar away."""
        if self.is_terminal:
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def _draw(self) -> None:
        width = 30
        filled = round(width * self.overall())
        seconds = int(time.monotonic() - self.start_time)
        columns = (os.get_terminal_size(self.stream.fileno()).columns if self.is_terminal else 0) or 80
        bar = f"{'█' * filled}{'░' * (width - filled)} {self.overall():4.0%} {seconds // 60}:{seconds % 60:02d}"
        text = f"{bar}  {self.current or ''} {self.note}"
        print(f"\r\x1b[K{text[: columns - 1]}", end="", file=self.stream, flush=True)


def shell_line(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """The command as one would type it, on several lines if it is long."""
    pieces = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    for number, word in enumerate(command):
        if number == 0 or word.startswith("--"):
            pieces.append(shlex.quote(word))
        else:  # a flag and its values stay on one line
            pieces[-1] += f" {shlex.quote(word)}"
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < 115:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    return " \\\n".join(lines)


def run_command(
    command: Sequence[str],
    *,
    log: Path,
    folder: Path,
    progress: Progress,
    variables: Mapping[str, str] | None = None,
    watch: Callable[[], tuple[float, str]] | None = None,
) -> None:
    """Runs a command in `folder` with its output in `log`; `variables` are printed before it and set for it.

    `watch` is asked several times a second how far the command is. Raises StageFailed with the end of the log if the
    command fails.
    """
    variables = dict(variables or {})
    line = shell_line(command, variables)
    progress.say(f"$ {line}")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=_environment() | variables, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            while True:
                try:
                    process.wait(0.25)
                    break
                except subprocess.TimeoutExpired:
                    progress.update(*(watch() if watch else (progress.fraction, "")))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise StageFailed(
            f"this command ended with status {process.returncode}:\n{line}\nIts log, {log}, ends with:\n{_end_of(log)}"
        )


def _end_of(log: Path) -> str:
    """The first lines that tell of an error, in case the programs around it printed much after them, and the last."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines[:-15] if re.match(r"(\[rank\d+\]: *)?(error|\w+Error):", line)]
    return "\n".join(f"  | {line}" for line in [*errors[:5], *lines[-15:]])


def _environment() -> dict[str, str]:
    """The caller's environment with this Python's programs first and without the network or settings of other runs."""
    programs = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_VARIABLES}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}
    return environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
