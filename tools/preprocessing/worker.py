"""Encoding of blocks."""

import itertools
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.tokenizers import Tokenizer
from tools.preprocessing.documents import BAD_UTF8, BLANK, NOT_JSON, BadDocument, check_texts, texts_of_line
from tools.preprocessing.engine import Engine, first_difference, reference_name
from tools.preprocessing.reader import TOO_LONG, Block, Lines, lines_of
from tools.preprocessing.settings import Settings, token_type

BROKEN_FILE = "broken file"
_CHECKED_CHARACTERS = 500
_BLOCKS_BETWEEN_LOOKS = 8
_BATCH = 64
# An engine that holds more is replaced by a new one: its cache grows with the text.
_MEMORY_OF_ALL = 600 << 20
_MEMORY_OF_WORKER = 200 << 20


class Encoded(NamedTuple):
    """One key's documents of a block: tokens back to back, tokens of each document (int32), how many had no token."""

    tokens: NDArray
    lengths: NDArray
    empty: int


_LONG_RUN = 1000
_MOST_LISTED = 10_000


class Fault(NamedTuple):
    """Why a line cannot be used."""

    reason: str
    detail: str


class Bad(NamedTuple):
    """A line of a block (counted from 0) that cannot be used, and why; with `lines` above 1 the first of so many."""

    line: int
    reason: str
    detail: str
    lines: int = 1


class BadLines:
    """The lines of a block that cannot be used, and how many bytes they and the blank lines have.

    They are listed one by one, but long runs of lines with the same fault as one, and what comes after the first
    10,000 by reason, so that a file of nothing else takes little time and makes a short list.
    """

    def __init__(self) -> None:
        self.lines, self.bytes, self.blank, self.blank_bytes = 0, 0, 0, 0
        self.is_full = False
        """Whether more lines are not listed one by one."""
        self._listed: list[Bad] = []
        self._others: dict[str, Bad] = {}

    def add(self, line: int, fault: Fault, lines: int, size: int) -> None:
        """So many lines that have the same fault, of `size` bytes in all: a run, or any once `is_full`."""
        if fault.reason == BLANK:
            self.blank += lines
            self.blank_bytes += size
            return
        self.lines += lines
        self.bytes += size
        if not self.is_full:
            self._listed.append(Bad(line, *fault, lines))
            self.is_full = len(self._listed) >= _MOST_LISTED
        elif fault.reason in self._others:
            first = self._others[fault.reason]
            self._others[fault.reason] = first._replace(line=min(first.line, line), lines=first.lines + lines)
        else:
            self._others[fault.reason] = Bad(line, *fault, lines)

    def entries(self) -> list[Bad]:
        """What is listed of them, in order."""
        listed = sorted(self._listed)
        found: list[Bad] = []
        start = 0
        for end in range(1, len(listed) + 1):
            first, last = listed[start], listed[end - 1]
            past = last.line + last.lines
            if end < len(listed) and listed[end].line == past and listed[end][1:3] == first[1:3]:
                continue
            if past - first.line >= _LONG_RUN:
                found.append(first._replace(lines=past - first.line))
            else:
                found += [first._replace(line=line, lines=1) for line in range(first.line, past)]
            start = end
        return found + sorted(self._others.values())


class Result(NamedTuple):
    """What became of a block."""

    parts: list[Encoded]
    lines: int
    text_bytes: int
    bad: list[Bad]
    lost_bytes: int
    """Bytes on disk of the lines that cannot be used."""
    blank: int
    blank_bytes: int
    difference: str | None
    """What the engine got wrong in the document that was checked against the reference, if anything."""
    cut: bool = False
    """Whether it ends in the middle of a line, as the last block of a file that was cut does."""


class Documents(NamedTuple):
    """What is in a block: the texts of each usable line with its place, the other lines, and how many there are."""

    rows: list[tuple[int, list[str]]]
    bad: BadLines
    total: int
    lines: Lines | None
    """None for the rows of a Parquet file."""
    cut: bool


@dataclass(slots=True)
class _Unlisted:
    line: int
    fault: Fault
    lines: int = 0
    bytes: int = 0


def read_documents(block: Block, keys: list[str]) -> Documents:
    """The documents of a block."""
    rows: list[tuple[int, list[str]]] = []
    bad = BadLines()
    if block.columns is not None:
        for number, values in enumerate(zip(*block.columns)):
            try:
                rows.append((number, check_texts(list(values), keys)))
            except BadDocument as error:
                bad.add(number, Fault(error.reason, error.detail), 1, 0)
        return Documents(rows, bad, max(len(block.columns[0]) if block.columns else 0, 1), None, False)
    lines = lines_of(block)
    faults: dict[bytes | int, Fault] = {}  # of each line that is no document: where they are many they are alike
    unlisted: dict[str, _Unlisted] = {}  # blank ones, and bad ones when many are listed, by reason
    number, total = 0, len(lines.lines)
    for line, equal in itertools.groupby(lines.lines):
        count = len(list(equal))
        if line not in faults:
            try:
                if isinstance(line, int):
                    raise BadDocument(TOO_LONG)
                texts = texts_of_line(line, keys)
                rows += [(each, texts) for each in range(number, number + count)]
            except BadDocument as error:
                faults[line] = Fault(error.reason, error.detail)
        fault = faults.get(line)
        if fault is not None:
            if number + count < total and (bad.is_full or fault.reason == BLANK):
                many = unlisted.get(fault.reason)
                if many is None:
                    many = unlisted[fault.reason] = _Unlisted(number, fault)
                many.lines += count
                many.bytes += (line if isinstance(line, int) else len(line) + 1) * count
            else:
                bad.add(number, fault, count, lines.size(number, count))
        number += count
    for many in unlisted.values():
        bad.add(many.line, many.fault, many.lines, many.bytes)
    last = lines.lines[-1] if lines.lines else b""
    cut = not lines.ends and last in faults and ends_within_a_line(last, faults[last].reason)
    return Documents(rows, bad, number, lines, cut)


def measured(block: Block, found: Documents) -> dict[str, Any]:
    """The fields of a Result that tell of lines: how many, which are bad, and their bytes on disk."""
    bad = found.bad
    lost, blank_bytes = bad.bytes, bad.blank_bytes
    if found.lines is None:
        lost = -(-(block.end - block.start) * bad.lines // found.total)
    elif block.lines:  # of what was decompressed, its share of the bytes on disk
        size, whole = block.end - block.start, len(block.lines)
        lost, blank_bytes = -(-size * lost // whole), size * blank_bytes // whole
    return {
        "lines": found.total,
        "bad": bad.entries(),
        "lost_bytes": lost,
        "blank": bad.blank,
        "blank_bytes": blank_bytes,
        "cut": found.cut,
    }


def ends_within_a_line(last: bytes | int, reason: str) -> bool:
    """Whether the last line, a bad one without a line end, begins an object that it does not end, or is of zeros."""
    if reason not in (NOT_JSON, BAD_UTF8) or isinstance(last, int):
        return False
    line = last.strip()
    return line[:1] in (b"{", b"\0") and not line.endswith(b"}")


class Encoder:
    """Turns blocks into token ids with `engine`, which is compared with the tokenizer `reference` on the way."""

    def __init__(self, settings: Settings, reference: Tokenizer, engine: Engine) -> None:
        self._reference, self._engine = reference, engine
        self._is_reference = engine.name == reference_name(reference)
        self._dtype = token_type(self._reference)
        self._keys = settings.json_keys
        self._bos = self._reference.bos if settings.append_bos else None
        self._eod = self._reference.eod if settings.append_eod else None
        self._blocks = 0
        self._memory_limit = _MEMORY_OF_WORKER + _MEMORY_OF_ALL // settings.workers

    def encode(self, block: Block) -> Result:
        """The documents of a block for each key, and the lines that are none."""
        if block.broken:
            reason = TOO_LONG if block.broken == TOO_LONG else BROKEN_FILE
            nothing = [self._assemble([]) for _ in self._keys]
            return Result(nothing, 1, 0, [Bad(0, reason, block.broken)], block.lost, 0, 0, None)
        found = read_documents(block, self._keys)
        columns = [[texts[i] for _, texts in found.rows] for i in range(len(self._keys))]
        ids, refused = self._encode_columns(columns, [line for line, _ in found.rows])
        for line, reason in refused:
            found.bad.add(line, Fault("not tokens", reason), 1, found.lines.size(line, 1) if found.lines else 0)
        difference = None if self._is_reference else self._check(columns[0], block)
        parts = [self._assemble(each) for each in ids]
        self._bound_memory()
        size = sum(len(text) if text.isascii() else len(text.encode()) for texts in columns for text in texts)
        return Result(parts=parts, text_bytes=size, difference=difference, **measured(block, found))

    def _encode_columns(
        self, columns: list[list[str]], lines: list[int]
    ) -> tuple[list[list[Any]], list[tuple[int, str]]]:
        """The ids by key, and the lines of which there are none, each with the reason."""
        try:
            return [self._batches(texts) for texts in columns], []
        except ValueError:
            pass
        # One of the texts has no ids (only NullTokenizer refuses any): find out which.
        ids: list[list[Any]] = [[] for _ in columns]
        bad = []
        for line, *texts in zip(lines, *columns):
            try:
                row = [self._engine.encode_batch([text])[0] for text in texts]
            except ValueError as error:
                bad.append((line, str(error)))
                continue
            for column, found in zip(ids, row):
                column.append(found)
        return ids, bad

    def _batches(self, texts: list[str]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(texts), _BATCH):
            # Arrays at once: the lists that some engines give take 16 times the memory.
            found += [np.asarray(ids, np.uint32) for ids in self._engine.encode_batch(texts[start : start + _BATCH])]
        return found

    def _assemble(self, documents: list[Any]) -> Encoded:
        bos, eod = self._bos, self._eod
        begin, end = np.array([bos or 0], np.uint32), np.array([eod or 0], np.uint32)
        pieces: list[Any] = []
        lengths: list[int] = []
        for ids in documents:
            size = len(ids)
            if not size:
                continue
            if bos is not None and ids[0] != bos:
                pieces.append(begin)
                size += 1
            pieces.append(ids)
            if eod is not None and ids[-1] != eod:
                pieces.append(end)
                size += 1
            lengths.append(size)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
        if len(tokens) and tokens.max() >= self._reference.vocab_size:
            raise ValueError(f"token id {tokens.max()} is outside the vocabulary of {self._reference.vocab_size}")
        return Encoded(tokens.astype(self._dtype), np.array(lengths, np.int32), len(documents) - len(lengths))

    def _check(self, texts: list[str], block: Block) -> str | None:
        """Compare a piece of one document of the block with the reference."""
        if not texts:
            return None
        # Any fixed rule that spreads: the same documents are checked in every run.
        text = texts[block.end * 7919 % len(texts)]
        start = block.end * 104729 % max(len(text) - _CHECKED_CHARACTERS, 1)
        return first_difference(self._engine, self._reference, [text[start : start + _CHECKED_CHARACTERS]])

    def _bound_memory(self) -> None:
        restart = getattr(self._engine, "restart", None)
        self._blocks += 1
        if restart and self._blocks % _BLOCKS_BETWEEN_LOOKS == 0 and resident_bytes() > self._memory_limit:
            restart()


def resident_bytes() -> int:
    """Memory of this process, or 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
