"""The process in which a parser meets its inputs, within bounds of time and memory that end it if they are passed.

`fuzz_child.py MODULE TARGET FOLDER --first N --seconds S` parses mutated inputs number N, N + 1, ...; with --replay the
inputs of a folder. What it did is in FOLDER/report.jsonl, the last input in FOLDER/case; see `fuzz_testing`.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "tests")]
from fuzz_mutations import mutate  # noqa: E402

from megatron.core.atomic_files import error_sentence  # noqa: E402
from megatron.core.text_files import terminal_output  # noqa: E402

MEMORY = 300 << 20
_LONGEST_MESSAGE = 2000


def check_error(error: BaseException) -> str | None:
    """What is wrong with an exception; None for those that become one sentence."""
    known = type(error) is ValueError or isinstance(error, OSError) or type(error).__module__.startswith("tools.")
    if not known or not isinstance(error, Exception):
        return f"{type(error).__name__}: {error!s:.300}"
    sentence = error_sentence(error)  # type: ignore[arg-type]
    if not str(error) or len(sentence) > _LONGEST_MESSAGE:
        return f"a message of {len(sentence)} characters"
    return None


def place_of(error: BaseException) -> str:
    """The last line of the project's own that an exception came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(ROOT / "tests")] or frames
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """No more time of processors and no more memory than an input may take; the former ends the process."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class Child:
    """A target and the folder it works in."""

    def __init__(self, module: str, target: str, folder: Path) -> None:
        self.target = importlib.import_module(module).TARGETS[target]
        self.name, self.folder, self.case = target, folder, folder / "case"
        self.report = open(folder / "report.jsonl", "a")  # noqa: SIM115 - until the process ends
        self.seen: set[tuple[str, str]] = set()
        self.seeds = []
        for number, make in enumerate(self.target.seeds):
            seed = folder / f"seed{number}"
            if not seed.exists():
                seed.mkdir()
                make(seed)
            self.seeds.append(seed)

    def tell(self, **record: Any) -> None:
        """A line of the report."""
        self.report.write(json.dumps(record) + "\n")
        self.report.flush()

    def check_seeds(self) -> None:
        """Parses every seed once: each has to be good, and libraries are loaded."""
        for seed in self.seeds:
            self._take(seed)
            self.target.parse(self.case)
        faulthandler.register(signal.SIGPROF, chain=True)

    def _take(self, seed: Path) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(seed, self.case)
        self._wrap()

    def _wrap(self) -> None:
        for name, wrap in self.target.wrap.items():
            if (self.case / name).exists():
                (self.case / name).write_bytes(wrap((self.case / name).read_bytes()))

    def draw(self, number: int) -> str:
        """Makes input `number` in the folder `case`; returns the name of the file that was changed."""
        draw = random.Random(f"{self.name} {number}")
        seed = draw.choice(self.seeds)
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(seed, self.case)
        files = sorted(path for pattern in self.target.files for path in self.case.glob(pattern))
        file = draw.choice(files)
        others = [path.read_bytes() for path in files]
        file.write_bytes(mutate(draw, file.read_bytes(), others))
        self.keep(seed, file)
        self._wrap()
        return file.name

    def keep(self, seed: Path, file: Path) -> None:
        """Keeps the changed file, as it was before it was wrapped, under a name that says where it belongs."""
        shutil.rmtree(self.folder / "last", ignore_errors=True)
        (self.folder / "last").mkdir()
        shutil.copyfile(file, self.folder / "last" / f"{seed.name}.{file.name}")

    def take_kept(self, path: Path) -> None:
        """Makes the input that was kept as `path`: NAME.seedN.FILE."""
        _, seed, name = path.name.split(".", 2)
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.folder / seed, self.case)
        (self.case / name).write_bytes(path.read_bytes())
        self.keep(self.folder / seed, self.case / name)
        self._wrap()

    def parse(self, number: int | str) -> None:
        """Parses the input in `case` and reports what must not be."""
        problem = None
        try:
            with bounded(self.target.seconds):
                self.target.parse(self.case)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            problem = check_error(error)
            if problem is not None and (type(error).__name__, place_of(error)) not in self.seen:
                self.seen.add((type(error).__name__, place_of(error)))
                kept = self.folder / "found" / str(len(list((self.folder / "found").glob("*"))))
                shutil.copytree(self.folder / "last", kept)
                self.tell(number=number, problem=problem, place=place_of(error), kept=str(kept))


def main() -> None:
    """Runs until the time is over or an input ends the process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="Python module that has TARGETS")
    parser.add_argument("target", help="which of them")
    parser.add_argument("folder", type=Path, help="where to work")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default: 60)")
    parser.add_argument("--replay", type=Path, nargs="*", help="inputs that were kept, instead of new ones")
    args = parser.parse_args()
    child = Child(args.module, args.target, args.folder)
    (child.folder / "found").mkdir(exist_ok=True)
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    with redirect_stdout(nowhere), redirect_stderr(nowhere), terminal_output():
        child.check_seeds()
        for number in _numbers(args):
            (child.folder / "number").write_text(str(number))
            if args.replay is None:
                child.draw(number)
            else:
                child.take_kept(args.replay[number])
            child.parse(number)
            child.tell(done=number)
    os._exit(0)  # libraries' threads may wait for memory that is not given


def _numbers(args: argparse.Namespace) -> Iterator[int]:
    if args.replay is not None:
        yield from range(args.first, len(args.replay))
        return
    end, number = time.monotonic() + args.seconds, args.first
    while time.monotonic() < end:
        yield number
        number += 1


if __name__ == "__main__":
    main()
