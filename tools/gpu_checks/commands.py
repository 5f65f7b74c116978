"""Commands with a time limit: nothing that they started is left when they have ended or are stopped."""

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")

_MARKER = "GPU_CHECK_COMMAND"
_numbers = itertools.count()
# What an outer torchrun or a user's settings would make these commands do differently.
_NOT_HANDED_ON = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE", "PYTEST_ADDOPTS",
    "TRITON_INTERPRET",
)  # fmt: skip
_POLL_SECONDS = 0.05
_NEWS_SECONDS = 20
_MOST_OUTPUT = 2_000_000


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    words: tuple[str, ...]
    status: int | None
    """Exit status, negative for a signal; None if it was stopped at its time limit."""
    output: str
    """Standard output and errors together, the end of it where it is very long."""
    seconds: float

    @property
    def line(self) -> str:
        """The command as one would type it in the project's folder."""
        words = ["python" if word == sys.executable else word.removeprefix(f"{ROOT}/") for word in self.words]
        return shlex.join(words)

    @property
    def name(self) -> str:
        """The program and what it is to do, for a sentence; `line` has all of the command."""
        program = next((Path(word).name for word in self.words if word.endswith((".py", ".sh"))), self.words[0])
        if program == sys.executable and "-m" in self.words:  # the last module: that before it starts the ranks
            program = [word for before, word in itertools.pairwise(self.words) if before == "-m"][-1]
        for option in ("--dry-run", "--nproc-per-node"):
            if option in self.words:
                program += f" {option} {self.words[self.words.index(option) + 1]}"
        return f"`{program}`"

    @property
    def ending(self) -> str:
        """In words."""
        if self.status is None:
            return f"stopped after {self.seconds:.0f} s, the time it had"
        if self.status < 0:
            return f"ended by {signal.Signals(-self.status).name}"
        return f"ended with status {self.status}"

    @property
    def last_words(self) -> str:
        """The line that says best why a command failed: its error, else its last line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
        return (errors or lines or [""])[0 if errors else -1][:300]


class _Running:
    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self.words = tuple(words)
        self.mark = f"{os.getpid()}-{next(_numbers)}"
        self.start = time.monotonic()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the command
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_HANDED_ON}
        variables |= {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", _MARKER: self.mark}
        self.process = subprocess.Popen(
            self.words, stdin=subprocess.DEVNULL, stdout=self.file, stderr=subprocess.STDOUT, cwd=ROOT,
            env=variables | dict(environment), start_new_session=True,
        )  # fmt: skip

    def output(self) -> str:
        self.file.seek(max(0, self.file.seek(0, os.SEEK_END) - _MOST_OUTPUT))
        return self.file.read().decode(errors="replace")

    def end(self) -> None:
        """Ends the command and whatever it has started, also in sessions of their own, as torchrun's ranks are."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while pids := marked_processes(self.mark):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)


def marked_processes(mark: str) -> list[int]:
    """Live processes that a command with this mark has started; none where the system does not tell."""
    entry = f"{_MARKER}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def run_together(
    commands: Sequence[Sequence[str]], seconds: float, environment: Mapping[str, str] | None = None
) -> list[Ran]:
    """Runs commands at the same time; after `seconds` those that still run are stopped.

    Each is a list of words, run in the project's folder, without the variables of an outer torchrun.
    """
    running: list[_Running] = []
    ended: dict[int, Ran] = {}
    try:
        running += [_Running(words, environment or {}) for words in commands]
        start = said = time.monotonic()
        while len(ended) < len(running):
            now = time.monotonic()
            for number, one in enumerate(running):
                status = one.process.poll()
                if number not in ended and (status is not None or now - start > seconds):
                    one.end()
                    ended[number] = Ran(one.words, status, one.output(), now - one.start)
            if now - said > _NEWS_SECONDS:
                said = now
                waiting = next(one for number, one in enumerate(running) if number not in ended)
                lines = waiting.output().strip().splitlines()
                print(f"    {now - start:4.0f} s  {lines[-1].strip()[:100] if lines else 'no output yet'}", flush=True)
            time.sleep(_POLL_SECONDS)
    finally:
        for one in running:
            one.end()
            one.file.close()
    return [ended[number] for number in range(len(running))]
