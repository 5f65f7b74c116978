"""What is counted on the way and reported at the end."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools.preprocessing.inputs import Corpus
from tools.preprocessing.kinds import printable

_PERCENTILES = (1, 10, 50, 90, 99)
_SAMPLE = 1 << 20


_LISTED_IN_DESCRIPTION = 1000
_LISTED_ON_TERMINAL = 20


@dataclass
class FileCount:
    """What came of a file or of a rank's part of it; `documents` by key."""

    documents: list[int]
    bytes: int = 0
    lines: int = 0
    bad_lines: int = 0
    lost_bytes: int = 0
    """Bytes on disk of which no document came, those of blank lines apart."""
    why: str = ""
    """Why its rest, or all of it, could not be read."""

    @property
    def trouble(self) -> str:
        """Why it gave nothing or ended early, or nothing."""
        if self.why or any(self.documents):
            return self.why
        if self.bad_lines:
            return f"none of its {self.lines} lines could be used"
        return "nothing but blank lines and empty texts" if self.bytes else "empty"

    @property
    def damaged(self) -> bool:
        """Whether it ended early, or has something in it of which nothing could be used."""
        return bool(self.why) or (self.bad_lines > 0 and not any(self.documents))

    def add(self, other: "FileCount") -> None:
        """Count another part's too."""
        self.documents = [a + b for a, b in zip(self.documents, other.documents)]
        self.bytes += other.bytes
        self.lines += other.lines
        self.bad_lines += other.bad_lines
        self.lost_bytes += other.lost_bytes
        self.why = self.why or other.why


@dataclass
class Statistics:
    """Counts of a run or of part of one; `bad` is by reason, `empty` by key, `files` by path."""

    empty: list[int]
    files: dict[str, FileCount] = field(default_factory=dict)
    lines: int = 0
    blank_lines: int = 0
    read_bytes: int = 0
    text_bytes: int = 0
    lost_bytes: int = 0
    blank_bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def from_record(record: dict[str, Any]) -> "Statistics":
        """From what JSON has kept of one."""
        files = {path: FileCount(**count) for path, count in record["files"].items()}
        return Statistics(**record | {"files": files})

    @property
    def bad_lines(self) -> int:
        """Lines that held something that could not be used; blank ones held nothing."""
        return sum(self.bad.values())

    @property
    def bad_fraction(self) -> float:
        """Share of the bytes on disk, blank lines apart, of which no document came because they are bad."""
        # A Git LFS pointer withholds more than its own bytes.
        total = sum(max(file.bytes, file.lost_bytes) for file in self.files.values())
        return self.lost_bytes / max(total - self.blank_bytes, 1)

    def add(self, other: "Statistics") -> None:
        """Count another part's too."""
        for path, file in other.files.items():
            self.files.setdefault(path, FileCount([0] * len(self.empty))).add(file)
        self.blank_lines += other.blank_lines
        self.blank_bytes += other.blank_bytes
        self.empty = [a + b for a, b in zip(self.empty, other.empty)]
        self.lines += other.lines
        self.read_bytes += other.read_bytes
        self.text_bytes += other.text_bytes
        self.lost_bytes += other.lost_bytes
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count

    def count(self, reason: str, lines: int) -> None:
        """So many more bad lines."""
        self.bad[reason] = self.bad.get(reason, 0) + lines

    def bad_summary(self) -> str:
        """Bad lines by reason, the most frequent first."""
        ordered = sorted(self.bad.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count}" for reason, count in ordered)

    def listed(self, corpus: Corpus, most: int) -> list[tuple[str, FileCount]]:
        """At most so many files in the order of the corpus, those with trouble before others."""
        nothing = FileCount([0] * len(self.empty))
        files = [(file.path, self.files.get(file.path, nothing)) for file in corpus.files]
        if len(files) <= most:
            return files
        troubled = [file for file in files if file[1].trouble][:most]
        others = [file for file in files if not file[1].trouble][: most - len(troubled)]
        chosen = {path for path, _ in troubled + others}
        return [file for file in files if file[0] in chosen]

    def damaged(self, corpus: Corpus) -> list[str]:
        """Paths of the files that ended early or gave nothing, in the order of the corpus."""
        return [file.path for file in corpus.files if file.path in self.files and self.files[file.path].damaged]

    def record(self, corpus: Corpus, key: int) -> dict[str, Any]:
        """What the description of data set number `key` says of its input."""
        files = []
        for path, file in self.listed(corpus, _LISTED_IN_DESCRIPTION):
            row = {"path": path, "documents": file.documents[key], "bytes": file.bytes}
            more = {"bad_lines": file.bad_lines, "lost_bytes": file.lost_bytes, "trouble": file.trouble}
            files.append(row | {name: value for name, value in more.items() if value})
        left = corpus.left_aside
        return {"files": files, "files_not_listed": len(corpus.files) - len(files), "left_aside": left}

    def file_lines(self, corpus: Corpus) -> list[str]:
        """A line for each file, for people."""
        lines = []
        listed = self.listed(corpus, _LISTED_ON_TERMINAL)
        for path, file in listed:
            bad = (
                f", {file.bad_lines} bad line{'s' * (file.bad_lines > 1)} ({file.lost_bytes} bytes)"
                if file.bad_lines
                else ""
            )
            trouble = f": {file.trouble}" if file.trouble else ""
            counts = f"{file.documents[0]} documents of {file.bytes} bytes{bad}"
            lines.append(f"  {printable(path)}: {counts}{trouble}")
        if len(listed) < len(corpus.files):
            lines.append(f"  and {len(corpus.files) - len(listed)} more files (see the description, .json)")
        return lines


def document_summary(prefix: str, empty: int) -> str:
    """Documents, tokens and percentiles of a data set (over evenly spread documents if there are very many)."""
    indexed = IndexedDataset(prefix)
    step = max(len(indexed) // _SAMPLE, 1)
    lengths: Any = indexed.sequence_lengths[::step]
    percentiles = np.percentile(lengths, _PERCENTILES).astype(int)
    spread = " | ".join(f"{percent}% {value}" for percent, value in zip(_PERCENTILES, percentiles))
    note = f" ({empty} empty documents left out)" if empty else ""
    return (
        f"{prefix}.bin and .idx: {indexed.document_count} documents, {indexed.token_count} tokens of type "
        f"{indexed.dtype.name}{note}\n  tokens a document: mean {indexed.token_count / max(len(indexed), 1):.1f} | "
        f"min {lengths.min()} | {spread} | max {lengths.max()}"
    )
