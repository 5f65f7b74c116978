"""Which files a run reads, in which order, and which part of them a rank reads."""

import glob
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

CHUNK_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")
# A compressed file cannot be cut: a rank takes all of it, and it counts as much text as it probably holds.
_EXPANSION = 4


class Input(NamedTuple):
    """Part of a file: lines that begin in bytes [start, end) if it is plain, else all of it."""

    path: str
    start: int
    end: int

    @property
    def is_plain(self) -> bool:
        """Whether any part of the file can be read without what comes before it."""
        return not self.path.endswith((".gz", ".zst", ".parquet"))

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


def natural_order(path: str) -> list[tuple[int, int | str]]:
    """Sort key under which 2.jsonl comes before 10.jsonl."""
    parts = re.split(r"([0-9]+)", path)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def find_inputs(patterns: list[str]) -> list[Input]:
    """The files of folders (below them too, links followed), files and globs; each once, however often named.

    Files of one pattern are in natural order, patterns in the order given. Raises ValueError for a pattern that
    matches nothing.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in sorted(_files_of(pattern), key=natural_order):
            found.setdefault(os.path.realpath(path), path)
    return [Input(path, 0, os.path.getsize(path)) for path in found.values()]


def _files_of(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    matches = [pattern] if os.path.isdir(pattern) else _expand(pattern)
    files = [path for path in matches if os.path.isfile(path)]
    files += [path for match in matches if os.path.isdir(match) for path in _walk(match)]
    if not files and os.path.isdir(pattern):
        raise ValueError(f"--input {pattern} has no *.jsonl or *.json files in it (nor .gz, .zst, .parquet)")
    if not files:
        raise ValueError(f"--input {pattern} is no file, no folder, and no pattern that matches a file")
    return files


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
    """Corpus files below a folder; hidden files and folders are left out."""
    for path, files in _tree(folder):
        for name in files:
            if name.endswith(SUFFIXES) and not name.startswith("."):
                if not os.path.isfile(os.path.join(path, name)):
                    raise ValueError(f"{os.path.join(path, name)} is a link to nothing: mend or remove it")
                yield os.path.join(path, name)


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
                parts.append(Input(part.path, *cuts))
        elif low <= position + weight // 2 < high or (weight == 0 and rank == 0):
            parts.append(part)
        position += weight
    return parts
