"""What is counted on the way and told at the end."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tools.preprocessing.documents import BLANK

_PERCENTILES = (1, 10, 50, 90, 99)
_SAMPLE = 1 << 20


@dataclass
class Statistics:
    """Counts of a run or of part of one; `bad` is by reason, `empty` by key."""

    empty: list[int]
    lines: int = 0
    read_bytes: int = 0
    text_bytes: int = 0
    lost_bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)

    @property
    def bad_lines(self) -> int:
        """Lines that held something that could not be used; blank ones held nothing."""
        return sum(count for reason, count in self.bad.items() if reason != BLANK)

    @property
    def bad_fraction(self) -> float:
        """Share of the lines, or of the bytes that could not be read at all, whichever is larger."""
        lines = max(self.lines - self.bad.get(BLANK, 0), 1)
        return max(self.bad_lines / lines, self.lost_bytes / max(self.read_bytes, 1))

    def add(self, other: "Statistics") -> None:
        """Count another part's too."""
        self.empty = [a + b for a, b in zip(self.empty, other.empty)]
        self.lines += other.lines
        self.read_bytes += other.read_bytes
        self.text_bytes += other.text_bytes
        self.lost_bytes += other.lost_bytes
        for reason, count in other.bad.items():
            self.bad[reason] = self.bad.get(reason, 0) + count

    def count(self, reason: str) -> None:
        """One more bad line."""
        self.bad[reason] = self.bad.get(reason, 0) + 1

    def bad_summary(self) -> str:
        """Bad lines by reason, the most frequent first."""
        ordered = sorted(self.bad.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{reason} {count}" for reason, count in ordered)


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
