"""Which files a run reads, in which order, and which part of them a rank reads."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tools.preprocessing import kinds

CHUNK_BYTES = 1 << 20
# A compressed file cannot be cut: a rank takes all of it, and it counts as much text as it probably holds.
_EXPANSION = 4


class Input(NamedTuple):
    """Part of a file: lines that begin in bytes [start, end) if it is plain, else all of it."""

    path: str
    start: int
    end: int
    kind: kinds.Kind = kinds.Kind(kinds.TEXT)

    @property
    def is_plain(self) -> bool:
        """Whether any part of the file can be read without what comes before it."""
        return self.kind.reading == kinds.TEXT

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


class Corpus(NamedTuple):
    """The files that --input names, and what it names that is no input."""

    files: list[Input]
    left_aside: dict[str, int]
    """Files of other kinds, by ending, the most frequent first."""
    products: int
    """Files that this project wrote: data sets, descriptions, quarantines, journals, temporary files."""
    other_names: int = 0
    """Links, also hard ones, to files that are read under another name."""


def identity(path: str) -> tuple[int | str, ...]:
    """What is the same for all names of a file: links of both kinds, and other ways to its folder."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return (os.path.realpath(path),)
    # Size and time as well, since some network file systems give two files the same number.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def natural_order(path: str) -> tuple[list[tuple[int, int | bytes]], bytes]:
    """Sort key under which 2.jsonl comes before 10.jsonl; no two paths are equal, and no locale has a say."""
    name = os.fsencode(path)
    parts = re.split(rb"([0-9]+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part], name


def find_inputs(patterns: list[str]) -> Corpus:
    """The files of folders (below them too, links followed), files and globs; each once, however often named.

    Files of one pattern are in natural order, patterns in the order given. Of folders, and of globs that match any
    file with an ending of a corpus, only such files are taken. Raises ValueError for a pattern that has none.
    """
    found: dict[tuple[int | str, ...], Input] = {}
    aside: dict[tuple[int | str, ...], str] = {}
    products: set[tuple[int | str, ...]] = set()
    other_names: set[str] = set()
    for pattern in patterns:
        taken, others = _files_of(pattern)
        for path in others:
            if kinds.is_product_name(path):
                products.add(identity(path))
            else:
                aside[identity(path)] = kinds.ending(path)
        inputs = 0
        for path in sorted(taken, key=natural_order):
            file = identity(path)
            if file not in found:
                head = None if kinds.is_product_name(path) else kinds.read_head(path)
                if head is None or kinds.is_product(head):
                    products.add(file)
                    continue
                found[file] = Input(path, 0, os.path.getsize(path), kinds.kind_of(path, head))
            elif os.path.abspath(path) != os.path.abspath(found[file].path):
                other_names.add(os.path.abspath(path))
            inputs += 1
        if not inputs and (not os.path.isfile(pattern) or (pattern == patterns[-1] and not found)):
            raise ValueError(f"--input {pattern} has nothing but files that this tool wrote itself")
    counts = Counter(name for file, name in aside.items() if file not in found)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Corpus(list(found.values()), dict(ordered), len(products), len(other_names))


def _files_of(pattern: str) -> tuple[list[str], list[str]]:
    """The files that a pattern means, and the others that it matches."""
    if os.path.isfile(pattern):
        return [pattern], []
    matches = [pattern] if os.path.isdir(pattern) else _expand(pattern)
    named = [path for path in matches if os.path.isfile(path)]
    files = [path for match in matches if os.path.isdir(match) for path in _walk(match)]
    taken = [path for path in [*named, *files] if kinds.is_corpus_name(path)]
    if named and not taken:
        taken = named
    if not taken and os.path.isdir(pattern):
        raise ValueError(f"--input {pattern} has no files in it that end in {kinds.ENDINGS_IN_WORDS}")
    if not taken and os.path.exists(pattern):
        raise ValueError(f"--input {pattern} is a pipe or a device, but files are read more than once: give a file")
    if not taken:
        raise ValueError(f"--input {pattern} is not a file, a folder, or a pattern that matches a file")
    chosen = set(taken)
    return taken, [path for path in [*named, *files] if path not in chosen]


def _expand(pattern: str) -> list[str]:
    """What a glob matches. `glob` itself would follow links that form a loop along every path of up to 40 links."""
    head, *tail = re.split(r"(?:^|(?<=/))(?:\*\*/+)*\*\*(?:/+|$)", pattern, maxsplit=1)
    if not tail:
        return glob.glob(pattern)
    matches = []
    for root in filter(os.path.isdir, glob.glob(head or "./")):
        for folder, files in _tree(root):
            if tail[0]:
                matches += _expand(os.path.join(glob.escape(folder), tail[0]))
            else:
                matches += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return matches if head else [path.removeprefix("./") for path in matches]


def _walk(folder: str) -> Iterator[str]:
    """Files below a folder; hidden files and folders are left out."""
    for path, files in _tree(folder):
        for name in files:
            if name.startswith("."):
                continue
            file = os.path.join(path, name)
            if kinds.is_corpus_name(name) and not os.path.isfile(file):
                what = "a pipe, socket or device, not a file" if os.path.exists(file) else "a link to nothing"
                raise ValueError(f"{file} is {what}: fix or remove it")
            yield file


def _tree(root: str) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, with their files; linked folders are entered once, hidden ones not."""
    seen = set()
    for path, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # By which of its names a folder is entered must not depend on the order in which a file system lists them.
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_order)
        yield path, files


def _refuse(error: OSError) -> None:
    raise error


def share(inputs: list[Input], rank: int, ranks: int) -> list[Input]:
    """What `rank` of `ranks` reads: consecutive parts of about the same size; all ranks' parts are all of `inputs`."""
    weights = [part.size * (1 if part.is_plain else _EXPANSION) for part in inputs]
    total = sum(weights)
    low, high = total * rank // ranks, total * (rank + 1) // ranks
    parts, position = [], 0
    for part, weight in zip(inputs, weights):
        if part.is_plain:
            # Cut where chunks of the whole file are cut, so that a rank's chunks are among those of a single process.
            cuts = [min(max(-(-(bound - position) // CHUNK_BYTES) * CHUNK_BYTES, 0), part.end) for bound in (low, high)]
            if cuts[0] < cuts[1]:
                parts.append(part._replace(start=cuts[0], end=cuts[1]))
        elif low <= position + weight // 2 < high or (weight == 0 and rank == 0):
            parts.append(part)
        position += weight
    return parts
