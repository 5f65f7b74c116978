"""Parsers under random damage: what a target is, and the hunt for inputs that end in anything but one sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CHILD = Path(__file__).with_name("fuzz_child.py")
_SECONDS_TO_START = 120
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Target:
    """A parser and good inputs for it."""

    seeds: Sequence[Callable[[Path], None]]
    """Each fills a folder with good files."""
    parse: Callable[[Path], object]
    """Reads what is in such a folder, all that a user of it would."""
    files: Sequence[str] = ("*",)
    """Patterns of the files that are damaged, one in an input."""
    wrap: Mapping[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    """By name, what makes a file of its damaged inner part: a checksum that is right, an archive around it."""
    seconds: float = 5
    """Of a processor's time that an input may take."""


@dataclass(frozen=True)
class Finding:
    """An input that a parser must not answer so."""

    number: int
    problem: str
    place: str
    kept: Path
    """A folder with the damaged file, named SEED.FILE."""


@dataclass(frozen=True)
class Hunt:
    """What came of a hunt."""

    inputs: int
    findings: list[Finding]


def hunt(module: str, target: str, folder: Path, seconds: float, first: int = 0) -> Hunt:
    """Damages the seeds of a target for so long, beginning with input number `first`.

    A child that dies of an input is followed by another one that begins behind it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end, findings, inputs = time.monotonic() + seconds, list[Finding](), 0
    while (left := end - time.monotonic()) > 0:
        done, dead = _run(folder, module, target, "--first", str(first), "--seconds", f"{left:.1f}", limit=left)
        inputs += done.inputs
        findings += [finding for finding in done.findings if finding.place not in {other.place for other in findings}]
        if dead is None:
            break
        findings.append(dead)
        first = dead.number + 1
    return Hunt(inputs, findings)


def replay(module: str, target: str, folder: Path, inputs: Sequence[Path]) -> Hunt:
    """The same for inputs that were kept, NAME.SEED.FILE."""
    folder.mkdir(parents=True, exist_ok=True)
    done, dead = _run(folder, module, target, "--replay", *map(str, inputs), limit=10.0 * len(inputs))
    return Hunt(done.inputs, done.findings + ([dead] if dead else []))


def _run(folder: Path, module: str, target: str, *more: str, limit: float) -> tuple[Hunt, Finding | None]:
    """What a child reports, and the input that it died of."""
    report = folder / "report.jsonl"
    report.unlink(missing_ok=True)
    command = [sys.executable, str(_CHILD), module, target, str(folder), *more]
    with open(folder / "output.txt", "wb") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=os.environ | _ENVIRONMENT, timeout=limit + _SECONDS_TO_START
            ).returncode
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
    records = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    inputs = sum("done" in record for record in records)
    findings = [
        Finding(record["number"], record["problem"], record["place"], Path(record["kept"]))
        for record in records
        if "problem" in record
    ]
    if code == 0:
        return Hunt(inputs, findings), None
    told = (folder / "output.txt").read_text(errors="replace").strip()
    if not (folder / "number").exists():
        raise AssertionError(f"{target}: its seeds cannot be read:\n{told[-3000:]}")
    number = int((folder / "number").read_text())
    kept = folder / "found" / f"died{number}"
    if (folder / "last").exists():
        shutil.copytree(folder / "last", kept, dirs_exist_ok=True)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Hunt(inputs, findings), Finding(
        number, f"the process ended by {how}:\n{told[-1500:]}", f"died of {number}", kept
    )
