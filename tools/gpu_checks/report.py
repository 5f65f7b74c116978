"""What the parts found: printed as it comes, and written as JSON and Markdown, whole after every part."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megatron.core.atomic_files import atomic_writer
from megatron.core.text_files import printable
from tools.gpu_checks.commands import Ran

Status = Literal["waiting", "running", "passed", "failed", "unfinished", "interrupted", "skipped"]
_WORDS = {"waiting": "not run yet", "running": "not run yet", "unfinished": "not finished in its share"}
MARKDOWN, JSON = "report.md", "report.json"
_TAIL = 3_000
_MOST_CELL = 300
_MOST_ROWS = 200


@dataclass
class Table:
    """Numbers of one kind; rows are printed as they are added."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Adds a row, and prints it."""
        row = tuple(printable(str(cell))[:_MOST_CELL] for cell in cells)
        assert len(row) == len(self.heads), (row, self.heads)
        if len(self.rows) < _MOST_ROWS:
            self.rows.append(row)
        print(f"    {' | '.join(row)}", flush=True)


@dataclass
class Command:
    """A command that a part ran."""

    line: str
    ending: str
    seconds: float
    tail: str
    """The end of its output."""


@dataclass
class Part:
    """One part of the check and what it found."""

    name: str
    title: str
    meaning: str
    """What the part shows, in a sentence."""
    status: Status = "waiting"
    sentence: str = ""
    """The result."""
    seconds: float = 0.0
    share: float = 0.0
    """Seconds it had."""
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    listings: dict[str, str] = field(default_factory=dict)
    """Output of other programs, by title."""
    commands: list[Command] = field(default_factory=list)

    @property
    def words(self) -> str:
        """The status, as it is told."""
        return _WORDS.get(self.status, self.status)

    def table(self, title: str, *heads: str) -> Table:
        """Begins a table."""
        print(f"  {title}:\n    {' | '.join(heads)}", flush=True)
        self.tables.append(Table(title, heads))
        return self.tables[-1]

    def note(self, text: str) -> None:
        """Adds a sentence."""
        self.notes.append(printable(text)[:2_000])
        print(f"  {self.notes[-1]}", flush=True)

    def listing(self, title: str, text: str) -> None:
        """Adds another program's output."""
        self.listings[title] = _tail(text.rstrip(), 4 * _TAIL)

    def ran(self, ran: Ran) -> None:
        """Adds a command."""
        tail = _tail(ran.output, _TAIL if ran.status != 0 else _TAIL // 4)
        self.commands.append(Command(ran.line[:2_000], ran.ending, round(ran.seconds, 1), tail))


@dataclass
class Report:
    """The whole check."""

    device: str
    machine: str
    """Device and versions in a line."""
    parts: list[Part]
    minutes: float = 0.0
    """For all parts together."""
    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    interrupted: str = ""

    @property
    def status(self) -> int:
        """Of the program: 1 if a part failed, else 3 if one did not come to its end, else 0."""
        found = {part.status for part in self.parts}
        return 1 if "failed" in found else 3 if found & {"unfinished", "interrupted"} or self.interrupted else 0

    @property
    def verdict(self) -> str:
        """One line: what is right and what is not."""
        names: dict[str, list[str]] = {}
        for part in self.parts:
            names.setdefault(part.words, []).append(part.name)
        passed = len(names.pop("passed", ()))
        others = "; ".join(f"{status}: {', '.join(parts)}" for status, parts in names.items())
        word = {0: "PASSED", 1: "FAILED", 3: "NOT FINISHED"}[self.status]
        if self.status == 0 and "not run yet" in names:
            word = "running"
        line = f"{word}: {passed} of {len(self.parts)} parts passed" + (f"; {others}" if others else "")
        if any(part.status == "unfinished" for part in self.parts):
            line += f" (give it more than {self.minutes:g} minutes with --minutes)"
        return line + (f"; {self.interrupted}" if self.interrupted else "")

    def markdown(self) -> str:
        """For readers."""
        when = f"{self.machine}. Started {self.started}, with {self.minutes:g} minutes for all parts."
        lines = ["# GPU check", "", f"**{self.verdict}**", "", when]
        if self.device == "cpu":
            lines += ["", "This was a trial of the check itself on a CPU (`--device cpu`), small: **no GPU was used**."]
        rows = [
            (p.name, p.words, f"{p.seconds:.0f} of {p.share:.0f}" if p.share else "", p.sentence) for p in self.parts
        ]
        lines += ["", *_markdown_table(("part", "result", "seconds of its share", "what was found"), rows)]
        for part in self.parts:
            if part.status == "waiting":
                continue
            lines += ["", f"## {part.title}", "", f"*{part.meaning}*", "", f"**{part.words}**: {part.sentence}"]
            for table in (table for table in part.tables if table.rows):
                lines += ["", f"{table.title}:", "", *_markdown_table(table.heads, table.rows)]
            lines += ["", *(f"- {note}" for note in part.notes)] if part.notes else []
            for title, text in part.listings.items():
                lines += ["", f"{title}:", "", *_fenced(text)]
            lines += _commands(part)
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Replaces both files in `folder`."""
        values = {"verdict": self.verdict, "status": self.status, **asdict(self)}
        with atomic_writer(folder / JSON) as file:
            file.write(json.dumps(values, indent=1, ensure_ascii=False).encode())
        with atomic_writer(folder / MARKDOWN) as file:
            file.write(self.markdown().encode())


def _tail(text: str, most: int) -> str:
    text = printable(text.replace("\r", "\n"))  # a bar that is drawn again and again
    return text if len(text) <= most else "...\n" + text[-most:]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    return [
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
        *(f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows),
    ]


def _fenced(text: str) -> list[str]:
    return ["```", text.replace("```", "'''"), "```"]


def _commands(part: Part) -> list[str]:
    """The commands, and the end of what those that failed said."""
    lines = []
    if part.commands:
        lines += ["", f"<details><summary>{len(part.commands)} command(s)</summary>", ""]
        lines += [f"- `{command.line}`: {command.ending}, {command.seconds} s" for command in part.commands]
        lines += ["", "</details>"]
    for command in part.commands:
        if command.ending != "ended with status 0":
            lines += ["", f"The end of what `{command.line[:120]}` printed:", "", *_fenced(command.tail or "(nothing)")]
    return lines
