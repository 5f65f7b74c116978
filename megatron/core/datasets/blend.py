"""What the data flags mean: sources and their weights for each split, and the order in which a blend takes them."""

from __future__ import annotations

import heapq
import json
import math
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from megatron.core.atomic_files import error_sentence
from megatron.core.datasets.indexed_dataset import data_set_prefix
from megatron.core.text_files import LARGEST_LIST, DuplicateNameError, read_text, shortened, without_duplicates

if TYPE_CHECKING:
    from megatron.core.config import DataConfig

SPLITS = ("train", "valid", "test")
DEFAULT_SPLIT = "969,30,1"


class Source(NamedTuple):
    """One data set of a blend."""

    prefix: str
    """Path without .bin and .idx."""
    weight: float | None
    """Share of the samples, of 1; None for a share in proportion to its tokens."""


class SplitBlend(NamedTuple):
    """What one split is made of."""

    sources: tuple[Source, ...]
    start: float
    """Where the split begins in the documents of each source, as a share of their number."""
    stop: float
    """Where it ends."""

    def documents(self, document_count: int) -> tuple[int, int]:
        """Its documents `[start, stop)`; a small share of few documents may be empty."""
        return round(self.start * document_count), round(self.stop * document_count)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_shares(flag: str, shares: Sequence[float], text: str) -> None:
    for share in shares:
        if not math.isfinite(share) or share < 0:
            raise ValueError(f"{flag} {text}: {share} is not a weight: weights are finite and not negative")
    if not 0 < sum(shares) < math.inf:
        raise ValueError(f"{flag} {text}: at least one weight must be above 0, and their sum finite")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, validation and test that sum to 1, from "969,30,1"; missing ones are 0."""
    shares = [_number(part) for part in split.split(",")]
    numbers = [share for share in shares if share is not None]
    if len(numbers) < len(shares) or len(shares) > len(SPLITS):
        raise ValueError(f"--split {split!r} must be up to three numbers separated by commas, for example 969,30,1")
    _check_shares("--split", numbers, split)
    train, valid, test = [*(share / sum(numbers) for share in numbers), 0.0, 0.0][:3]
    return train, valid, test


# What separates words in other programs' lists, but not here.
_SEPARATOR = re.compile(r"[\s,;]|^[\d.]+[:=]")


def _check_words(flag: str, arguments: Sequence[str]) -> None:
    """Raises ValueError if a word looks like several, unless that is the name of a data set."""
    if not all(arguments):
        raise ValueError(f"{flag} has an empty word: name a data set (is a variable of the script not set?)")
    joined = next((word for word in arguments if _SEPARATOR.search(word)), None)
    if joined is not None and not os.path.exists(f"{data_set_prefix(joined)}.idx"):
        raise ValueError(
            f"{flag} {joined!r} is not a data set; give every weight and every data set as a separate word, without "
            "quotes around several and without commas, for example 0.6 a_text_document 0.4 b_text_document"
        )


def parse_blend(flag: str, arguments: Sequence[str]) -> tuple[Source, ...]:
    """Sources from the values of a flag: prefixes, or each behind its weight; weights are made to sum to 1.

    Without weights every source is taken in proportion to its tokens in the split, so that all of them are read equally
    often. Raises ValueError for a list that mixes the two forms, weights that are negative, not finite or all zero, a
    source named twice, and words that look like several.
    """
    _check_words(flag, arguments)
    text = shortened(" ".join(arguments))
    if not any(_number(part) is not None for part in arguments):
        weights: list[float | None] = [None] * len(arguments)
        prefixes = list(arguments)
    else:
        weights, prefixes = [_number(part) for part in arguments[::2]], list(arguments[1::2])
        numbers = [weight for weight in weights if weight is not None]
        odd = len(arguments) % 2 or len(numbers) < len(weights)
        if odd or any(_number(prefix) is not None for prefix in prefixes):
            raise ValueError(
                f"{flag} {text}: give a weight before every data set or before none, for example "
                "0.6 a_text_document 0.4 b_text_document"
            )
        _check_shares(flag, numbers, text)
        total = sum(numbers)
        weights = [weight / total for weight in numbers]
    prefixes = [data_set_prefix(prefix) for prefix in prefixes]
    seen: dict[str, str] = {}
    for prefix in prefixes:
        _check_name(flag, prefix)
        path = os.path.realpath(f"{prefix}.bin")
        if path in seen:
            also = f" (also as {prefix})" * (seen[path] != prefix)
            raise ValueError(f"{flag} names {seen[path]} twice{also}: name it once, with the sum of its weights")
        seen[path] = prefix
    return tuple(map(Source, prefixes, weights))


def _check_name(flag: str, prefix: str) -> None:
    try:
        os.fsencode(prefix)
        usable = not any(ord(character) < 32 or ord(character) == 127 for character in prefix) and bool(prefix)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ValueError(f"{flag} names the data set {shortened(prefix)!a}, which cannot be a file name")


def _read_text(flag: str, path: str) -> str:
    try:
        return read_text(path, LARGEST_LIST)
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error_sentence(error)}") from error


def _per_split_file(path: str) -> list[Sequence[str]]:
    """Data path arguments of train, valid and test from a JSON object with these keys."""
    try:
        content = json.loads(_read_text("--per-split-data-args-path", path), object_pairs_hook=without_duplicates)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"--per-split-data-args-path {path} is not JSON: {error}") from error
    except DuplicateNameError as error:
        raise ValueError(f"--per-split-data-args-path {path} has {error} twice: put all of it in one list") from None
    known = isinstance(content, dict) and any(content.values()) and content.keys() <= set(SPLITS)
    lists = list(content.values()) if known else []
    if not known or not all(isinstance(part, list) and all(isinstance(x, str) for x in part) for part in lists):
        raise ValueError(
            f'--per-split-data-args-path {path} must be a JSON object like {{"train": ["0.6", "a_text_document", '
            '"0.4", "b_text_document"], "valid": ["c_text_document"]}'
        )
    return [content.get(split, []) for split in SPLITS]


def split_blends(config: DataConfig) -> tuple[SplitBlend | None, SplitBlend | None, SplitBlend | None]:
    """The blends of train, validation and test; None for a split without data. Raises ValueError, naming the flag."""
    per_split: list[Sequence[str]] = [config.train_data_path, config.valid_data_path, config.test_data_path]
    flags = [f"--{split}-data-path" for split in SPLITS]
    if config.per_split_data_args_path:
        per_split = _per_split_file(config.per_split_data_args_path)
        flags = [f"--per-split-data-args-path {config.per_split_data_args_path}: {split}" for split in SPLITS]
    if any(per_split):
        train, valid, test = (
            SplitBlend(parse_blend(flag, arguments), 0.0, 1.0) if arguments else None
            for flag, arguments in zip(flags, per_split, strict=True)
        )
        return train, valid, test
    flag, arguments = "--data-path", config.data_path
    if config.data_args_path:
        flag = f"--data-args-path {config.data_args_path}:"
        text = _read_text("--data-args-path", config.data_args_path)
        if text.lstrip().startswith(("{", "[")):
            raise ValueError(f"{flag} this is JSON: a file of splits is given with --per-split-data-args-path")
        arguments = tuple(text.split())
    if not arguments:
        raise ValueError(f"{flag} names no data set: give the prefix of one, or --mock-data")
    sources = parse_blend(flag, arguments)
    shares = parse_split(config.split or DEFAULT_SPLIT)
    bounds = [0.0, shares[0], shares[0] + shares[1], 1.0]
    train, valid, test = (
        SplitBlend(sources, start, stop) if share else None
        for share, (start, stop) in zip(shares, pairwise(bounds), strict=True)
    )
    return train, valid, test


class BlendOrder:
    """Which source each sample of a blend comes from, in closed form: nothing is built or stored.

    Sources are the leaves of a Huffman tree over their weights. At each node of n samples, round(share * n) are the
    left child's, so that sample n goes left where this number rises. A child has at most 2/3 of its node unless it is a
    leaf, which keeps every source's count within 2 of weight * n after any number n of samples, mostly within 1.
    A source's place depends on the weights and the sample's number alone.
    """

    _ONE = 1 << 60  # shares are integers of this unit, so that every machine rounds alike

    def __init__(self, weights: Sequence[float]) -> None:
        """`weights` are positive; only their ratios matter."""
        assert len(weights) > 0 and min(weights) > 0, weights
        self._count = len(weights)
        # children of inner nodes; a source is its number, the inner node i is -1 - i
        self._nodes: list[tuple[int, int, int]] = []
        heap = [(weight, source, source) for source, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, first, right = heapq.heappop(heap)
            heavy, second, left = heapq.heappop(heap)
            self._nodes.append((int(self._ONE * (heavy / (heavy + light))), left, right))
            heapq.heappush(heap, (heavy + light, min(first, second), -len(self._nodes)))
        self._root = heap[0][2]

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples of that source come before it."""
        node, number = self._root, sample
        while node < 0:
            share, left, right = self._nodes[-1 - node]
            before = self._left(share, number)
            if self._left(share, number + 1) > before:
                node, number = left, before
            else:
                node, number = right, number - before
        return node, number

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples each source has."""
        counts = [0] * self._count
        pending = [(self._root, samples)]
        while pending:
            node, number = pending.pop()
            if node >= 0:
                counts[node] = number
            else:
                share, left, right = self._nodes[-1 - node]
                before = self._left(share, number)
                pending += [(left, before), (right, number - before)]
        return counts

    def _left(self, share: int, number: int) -> int:
        return (share * number + self._ONE // 2) // self._ONE
