"""Several processes, on one machine or many, that share a folder: each takes a part, rank 0 puts the parts together.

They need no network: every rank keeps a small status file next to its part, which rank 0 watches. A part that is
complete is known by the fingerprint of what it was made from, so that a part of an earlier run is not made twice.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.atomic_files import atomic_writer, error_sentence
from tools.preprocessing.part import Report
from tools.preprocessing.records import seal, unseal
from tools.preprocessing.statistics import Statistics

_SECONDS_BETWEEN_BEATS = 1.0
# A failure found at the start is a leftover if its rank has restarted by then, since its file is replaced.
_SECONDS_TO_RESTART = 10.0


class Place(NamedTuple):
    """This process among those of the job."""

    rank: int = 0
    ranks: int = 1

    @property
    def label(self) -> str:
        """Beginning of its lines."""
        return f"[rank {self.rank} of {self.ranks}] " if self.ranks > 1 else ""


def place_from(environment: Mapping[str, str]) -> Place:
    """Rank and number of ranks as torchrun or srun set them, else one alone.

    A command typed in the shell of `srun --pty` is alone: only the step's first task has a terminal. Raises ValueError
    for nonsense, and in the other tasks of such a step.
    """
    for rank_name, size_names in (
        ("RANK", ("WORLD_SIZE",)),
        ("SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ):
        size_name = next((name for name in size_names if name in environment), None)
        if rank_name not in environment or size_name is None:
            continue
        # A batch script has rank 0 but no other ranks: only srun starts the other tasks.
        if rank_name == "SLURM_PROCID" and "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
            continue
        try:
            place = Place(int(environment[rank_name]), int(environment[size_name]))
        except ValueError:
            place = Place(-1, 0)
        if not 0 <= place.rank < place.ranks:
            raise ValueError(
                f"{rank_name}={environment[rank_name]} and {size_name}={environment[size_name]} are not a rank of a "
                f"job: unset {rank_name} to run alone"
            )
        if rank_name == "SLURM_PROCID" and "SLURM_PTY_PORT" in environment:
            if place.rank:
                raise ValueError(
                    f"SLURM_PROCID={place.rank} in a step of srun --pty (SLURM_PTY_PORT), whose first task alone has "
                    "the terminal and does the work: leave --pty out to share the work among tasks"
                )
            return Place()
        return place
    return Place()


def part_prefix(prefix: str, place: Place) -> str:
    """Where a rank writes its part."""
    return f"{prefix}_rank{place.rank:05}of{place.ranks:05}" if place.ranks > 1 else prefix


def status_path(prefix: str, place: Place) -> Path:
    """The status file of a rank."""
    return Path(f"{part_prefix(prefix, place)}_status.json")


def read_status(prefix: str, place: Place) -> dict[str, Any] | None:
    """What a rank last said of itself, or None."""
    try:
        status = json.loads(status_path(prefix, place).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return status if isinstance(status, dict) and isinstance(status.get("state"), str) else None


def finished_report(prefix: str, place: Place, fingerprint: str) -> Report | None:
    """The report of a rank whose part, made from what `fingerprint` says, is complete."""
    try:
        status = unseal(status_path(prefix, place).read_bytes())
    except (OSError, ValueError):  # not there, or not that of a rank that is done
        return None
    if status["state"] != "done" or status["fingerprint"] != fingerprint:
        return None
    statistics, *rest = status["report"]
    return Report(Statistics.from_record(statistics), *rest)


class Ranks:
    """This rank's status file, renewed by a thread, and a watch on those of the others."""

    def __init__(self, prefix: str, place: Place, timeout: float) -> None:
        self._prefix, self._place, self._timeout = prefix, place, timeout
        self._others = [Place(rank, place.ranks) for rank in range(place.ranks) if rank != place.rank]
        # What is there already is of an earlier run, or of a rank of this one that was faster to fail.
        self._began = time.monotonic()
        self._old_failures = {place: self._failure(place) for place in self._others}
        self._status: dict[str, Any] = {"state": "working", "run": uuid.uuid4().hex, "beat": 0}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._looked = 0.0

    def __enter__(self) -> "Ranks":
        if self._place.ranks > 1:
            status_path(self._prefix, self._place).parent.mkdir(parents=True, exist_ok=True)
            self._publish()
        return self

    def show_life(self) -> None:
        """Renew the status file from now on, by a thread; not before the worker processes are forked."""
        if self._place.ranks > 1:
            self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._place.ranks == 1:
            return
        self._end_beats()
        if error is not None:
            sentence = error_sentence(error) if isinstance(error, OSError | ValueError) else str(error)
            self._status |= {"state": "failed", "error": sentence or type(error).__name__}
            self._publish()

    def _end_beats(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(_SECONDS_BETWEEN_BEATS):
            with self._lock:
                self._status["beat"] += 1
                self._publish()

    def _publish(self) -> None:
        path = status_path(self._prefix, self._place)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._status))
        os.replace(temporary, path)

    def _failure(self, place: Place) -> str | None:
        status = read_status(self._prefix, place)
        return json.dumps(status) if status and status.get("state") == "failed" else None

    def check(self) -> None:
        """Raises ValueError if another rank has failed; looks once a second."""
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_BEATS:
            return
        self._looked = now
        for place in self._others:
            failure = self._failure(place)
            is_new = failure != self._old_failures[place] or now - self._began > _SECONDS_TO_RESTART
            if failure and is_new:
                raise ValueError(f"rank {place.rank} failed: {json.loads(failure).get('error')}")

    def done(self, fingerprint: str, report: Report) -> None:
        """Say that this rank's part is complete."""
        self._end_beats()
        record = [asdict(report.statistics), *report[1:]]
        self._status |= {"state": "done", "fingerprint": fingerprint, "report": record}
        with atomic_writer(status_path(self._prefix, self._place)) as file:
            file.write(seal(self._status))

    def wait(self, fingerprints: list[str]) -> list[Report]:
        """The reports of all ranks, when all parts are there. Raises ValueError if a rank failed or is silent."""
        reports: dict[int, Report] = {}
        seen: dict[int, tuple[Any, float]] = {}
        while True:
            self.check()
            for rank, fingerprint in enumerate(fingerprints):
                if rank in reports:
                    continue
                place = Place(rank, self._place.ranks)
                if report := finished_report(self._prefix, place, fingerprint):
                    reports[rank] = report
                    continue
                status, now = read_status(self._prefix, place), time.monotonic()
                if rank not in seen or seen[rank][0] != status:
                    seen[rank] = status, now
                elif now - seen[rank][1] > self._timeout:
                    raise ValueError(self._silence(rank, status))
            if len(reports) == len(fingerprints):
                return [reports[rank] for rank in range(len(fingerprints))]
            time.sleep(0.1)

    def _silence(self, rank: int, status: dict[str, Any] | None) -> str:
        if status is None:
            return (
                f"rank {rank} has not begun in {self._timeout:g} seconds: do all ranks see {self._prefix}*? RANK with "
                f"WORLD_SIZE, or SLURM_PROCID with SLURM_NTASKS, in the environment make this rank 0 of "
                f"{self._place.ranks}; without them (env -u RANK -u SLURM_PROCID ...) it runs alone"
            )
        if status["state"] == "done":
            return f"rank {rank} read other files than rank 0 would: do all ranks see the same --input?"
        return f"rank {rank} has shown no sign of life for {self._timeout:g} seconds; run again with --resume"
