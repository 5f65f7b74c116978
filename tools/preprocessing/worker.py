"""Encoding of blocks."""

import os
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


_SHORT = 64
_LONG_RUN = 1000


class Bad(NamedTuple):
    """A line of a block (counted from 0) that cannot be used, and why; with `lines` above 1 a run of such lines."""

    line: int
    reason: str
    detail: str
    lines: int = 1


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
    """What is in a block: the texts of each usable line with its place, the places of the others, and the lines."""

    rows: list[tuple[int, list[str]]]
    bad: list[Bad]
    """Blank lines among them."""
    lines: Lines | None
    """None for the rows of a Parquet file."""


def read_documents(block: Block, keys: list[str]) -> Documents:
    """The documents of a block; places are counted without the runs of blank lines (see `Lines.numbers`)."""
    rows: list[tuple[int, list[str]]] = []
    bad: list[Bad] = []
    if block.columns is not None:
        for number, values in enumerate(zip(*block.columns)):
            try:
                rows.append((number, check_texts(list(values), keys)))
            except BadDocument as error:
                bad.append(Bad(number, error.reason, error.detail))
        return Documents(rows, bad, None)
    lines = lines_of(block)
    junk: dict[bytes, tuple[str, str]] = {}  # short lines that are no documents: where they are many they are alike
    for number, line in enumerate(lines.lines):
        if isinstance(line, int):
            bad.append(Bad(number, TOO_LONG, ""))
        elif len(line) < _SHORT and line in junk:
            bad.append(Bad(number, *junk[line]))
        else:
            try:
                rows.append((number, texts_of_line(line, keys)))
            except BadDocument as error:
                bad.append(Bad(number, error.reason, error.detail))
                if len(line) < _SHORT:
                    junk[line] = (error.reason, error.detail)
    return Documents(rows, bad, lines)


def measured(block: Block, found: Documents, bad: list[Bad]) -> dict[str, Any]:
    """The fields of a Result that tell of lines: how many, which are bad, and their bytes on disk."""
    if found.lines is None:
        rows = max(len(block.columns[0]) if block.columns else 0, 1)
        lost = -(-(block.end - block.start) * len(bad) // rows)
        return {"lines": rows, "bad": bad, "lost_bytes": lost, "blank": 0, "blank_bytes": 0, "cut": False}
    lines = found.lines
    cut = not lines.ends and ends_within_a_line(lines.lines[-1:], bad)
    single = [each for each in bad if each.reason == BLANK]
    bad = [each for each in bad if each.reason != BLANK]
    lost = sum(lines.size(each.line) for each in bad)
    blank_bytes = lines.blank_bytes + sum(lines.size(each.line) for each in single)
    if block.lines:  # of what was decompressed, its share of the bytes on disk
        size, whole = block.end - block.start, len(block.lines)
        lost, blank_bytes = -(-size * lost // whole), size * blank_bytes // whole
    if bad and lines.blank:
        numbers = lines.numbers()
        bad = [Bad(numbers[line], reason, detail) for line, reason, detail, _ in bad]
    count, blank = len(lines.lines) + lines.blank, lines.blank + len(single)
    return {
        "lines": count,
        "bad": in_runs(bad),
        "lost_bytes": lost,
        "blank": blank,
        "blank_bytes": blank_bytes,
        "cut": cut,
    }


def in_runs(bad: list[Bad]) -> list[Bad]:
    """The same with one entry for many lines in a row that have the same fault, so that a list of them stays short."""
    if len(bad) < _LONG_RUN:
        return bad
    found, start = [], 0
    for end in range(1, len(bad) + 1):
        first, last = bad[start], bad[end] if end < len(bad) else None
        if last is None or last.line != first.line + end - start or last[1:] != first[1:]:
            found += [first._replace(lines=end - start)] if end - start >= _LONG_RUN else bad[start:end]
            start = end
    return found


def ends_within_a_line(last: list[bytes | int], bad: list[Bad]) -> bool:
    """Whether the last line, which has no line end, begins an object that it does not end, or is of zeros."""
    if not last or not bad or bad[-1].reason not in (NOT_JSON, BAD_UTF8) or isinstance(last[0], int):
        return False
    line = last[0].strip()
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
        difference = None if self._is_reference else self._check(columns[0], block)
        parts = [self._assemble(each) for each in ids]
        self._bound_memory()
        size = sum(len(text) if text.isascii() else len(text.encode()) for texts in columns for text in texts)
        counts = measured(block, found, sorted(found.bad + refused))
        return Result(parts=parts, text_bytes=size, difference=difference, **counts)

    def _encode_columns(self, columns: list[list[str]], lines: list[int]) -> tuple[list[list[Any]], list[Bad]]:
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
                bad.append(Bad(line, "not tokens", str(error)))
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
