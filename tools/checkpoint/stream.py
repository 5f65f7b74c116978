"""What loaders give and savers take: a description of a checkpoint, and its weights some rows at a time.

A plugin is a file `loader_NAME.py` or `saver_NAME.py`, ours or anywhere on the Python path, with
`add_arguments(parser)` and

    open_source(args) -> Source       (loader)
    save(source, args) -> None        (saver; the source is a CheckedSource)
    check(args) -> None               (saver, if it has one: refuses what it can before the source is opened)

A source may also have `verify()`, which reads weights to check them; it is called before the first row is asked for.
The saver asks for the rows of each weight once, in their order; several weights at once. `transfer` does that for a
`Writer`, in several threads, and `print_plan` prints the plan instead with --dry-run.
"""

import math
import mmap
import os
import shutil
import sys
import threading
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from megatron.core.config import ModelConfig
from megatron.core.interchange import model_config_from_args
from megatron.core.interchange.element_types import STORED_AS, Array
from megatron.core.models.mixtral.weights import mixtral_table, mixtral_weights
from megatron.core.models.weight_table import WeightRule
from tools.checkpoint.model_folder import Target
from tools.run_tool import usable_cores

_T = TypeVar("_T")

CHUNK_BYTES = 2 << 20
"""Size of the rows that a thread holds at a time, about."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint holds, apart from its weights."""

    model: ModelConfig
    """Shape of the model, with its true vocabulary size."""
    dtype: str
    """Type of every element the source gives, such as `bfloat16`."""
    folder: Path
    """Folder it was read from."""
    seq_length: int
    """Sequence length it was trained with, or is meant for."""
    sliding_window: int | None = None
    """Tokens a position may attend to, if fewer than the sequence."""
    tokenizer_type: str | None = None
    """Kind of tokenizer, if the checkpoint names one."""
    tokenizer_model: str | None = None
    """Where the tokenizer's files are, if the checkpoint names it."""
    vocab_file: str | None = None
    """The vocab.json of a GPT2BPETokenizer."""
    merge_file: str | None = None
    """Its merges.txt."""
    config_changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face config that are no longer those of the model it was read from."""


class Source(Protocol):
    """An opened checkpoint whose names, shapes and types have all been checked."""

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one Megatron weight, in the description's type, as `WeightRule.chunks` gives them.

        `out` is an array of just that shape and type that they can be put in, which saves a copy.
        """

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from: a file and a tensor in it, for each tensor it is made of."""


class CheckedSource:
    """A source of which every row of every weight has to be read exactly once."""

    def __init__(self, source: Source, progress: "Progress", dry_run: bool = False) -> None:
        self._source = source
        self._progress = progress
        self.dry_run = dry_run
        self._done: dict[str, tuple[int, int]] = {}
        self._verified = False

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._source.description

    def origin(self, rule: WeightRule) -> list[str]:
        """Where a weight comes from."""
        return self._source.origin(rule)

    def verify(self) -> None:
        """The source's own check of its contents, if it has one: once, before the first row is read."""
        if not self._verified:
            verify_source(self._source)
            self._verified = True

    def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
        """Some rows of one weight; raises ValueError if they are not those after the last ones read."""
        self.verify()
        done, total = self._done.get(rule.name, (0, rule.shape[0]))
        if rows.start != done or total != rule.shape[0]:
            raise ValueError(f"{rule.name}: rows {rows.start} to {rows.stop} are asked for after row {done}")
        array = self._source.read(rule, rows, out)
        self._done[rule.name] = (rows.stop, total)
        self._progress.advance(array.nbytes)
        return array

    def check_complete(self) -> None:
        """Raises ValueError naming the first weight of which not every row was read."""
        for name in sorted({rule.name for rule in mixtral_weights(self.description.model)} | set(self._done)):
            done, total = self._done.get(name, (0, 1))
            if done != total:
                raise ValueError(f"{name} was not read completely: {done} rows")


class Destination(NamedTuple):
    """A tensor that a weight, or a part of it, is written to."""

    file: str
    """Path in the folder that is written."""
    name: str
    nbytes: int
    part: str = ""
    """Which part of the weight it is, in words; empty for all of it."""


class Writer(Protocol):
    """Where weights go."""

    def chunks(self, rule: WeightRule) -> Iterator[range]:
        """The rows of a weight, cut as they are to be read."""

    def destinations(self, rule: WeightRule) -> list[Destination]:
        """All tensors that hold some of a weight."""

    def write(self, rule: WeightRule, rows: range, array: Array) -> None:
        """Puts rows of a weight where they belong; called in their order for each weight."""


def verify_source(source: Source) -> None:
    """Calls `source.verify()`, which a source has if it reads weights to check them; after all that costs less."""
    verify = getattr(source, "verify", None)
    if verify is not None:
        verify()


def transfer(source: CheckedSource, writer: Writer, rules: Iterable[WeightRule]) -> None:
    """Moves weights, each by one thread; the first error stops all."""
    source.verify()
    buffers, dtype = ThreadBuffer(), source.description.dtype

    def move(rule: WeightRule) -> None:
        for rows in writer.chunks(rule):
            out = buffers.array((len(rows), *rule.shape[1:]), STORED_AS[dtype])
            writer.write(rule, rows, source.read(rule, rows, out))

    in_threads(move, rules)


def rows_of(rule: WeightRule, rows: range, dtype: str, out: Array | None) -> Array:
    """`out`, or else a new array for `rows` of a weight as elements of type `dtype`."""
    return np.empty((len(rows), *rule.shape[1:]), STORED_AS[dtype]) if out is None else out


class ThreadBuffer(threading.local):
    """Memory of each thread's own, used again and again."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
        """An array in this memory; the one before it is lost."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._bytes.size < nbytes:
            self._bytes = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        return self._bytes[:nbytes].view(dtype).reshape(shape)


def in_threads(action: Callable[[WeightRule], None], rules: Iterable[WeightRule]) -> None:
    """Calls `action` with every weight, several at once; the first error stops all."""
    with ThreadPoolExecutor(min(max(usable_cores(), 2), 8)) as pool:
        running = [pool.submit(action, rule) for rule in rules]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def rows_at_a_time(rule: WeightRule, dtype: str) -> int:
    """Rows of a weight that make up `CHUNK_BYTES`."""
    return max(CHUNK_BYTES // (math.prod(rule.shape[1:]) * STORED_AS[dtype].itemsize), 1)


def print_plan(source: Source, writer: Writer, rules: Iterable[WeightRule]) -> None:
    """Every weight with where it comes from and goes to."""
    dtype = source.description.dtype
    for rule in rules:
        size = math.prod(rule.shape) * STORED_AS[dtype].itemsize
        print(f"{rule.name} {list(rule.shape)} {dtype}, {size:,} bytes")
        for origin in source.origin(rule):
            print(f"    from {origin}")
        for to in writer.destinations(rule):
            print(f"    to   {to.file}: {to.name}{f', {to.part}' if to.part else ''}, {to.nbytes:,} bytes")


def planned_bytes(writer: Writer, rules: Iterable[WeightRule]) -> dict[str, int]:
    """Size of every file that `rules` are written to, a little more than it will be."""
    sizes: dict[str, int] = {}
    for rule in rules:
        for to in writer.destinations(rule):
            sizes[to.file] = sizes.get(to.file, 1 << 16) + to.nbytes + 512
    return sizes


def check_disk(target: Target, sizes: dict[str, int], *, report: bool) -> None:
    """Raises ValueError if the target cannot be made or its disk has no room for files of these sizes.

    With `report`, prints both.
    """
    folder = target.name
    existing = next(parent for parent in (target.folder, *target.folder.parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{folder} cannot be made: {existing} is not a folder")
    needed, (capacity, _, free) = sum(sizes.values()), shutil.disk_usage(existing)
    if capacity == 0 or not os.access(existing, os.W_OK):
        raise ValueError(f"{folder} cannot be made: nothing can be written to {existing}; choose a folder on a disk")
    if report:
        largest = max(sizes.values())
        print(
            f"to write: {len(sizes)} file(s), {needed / 1e9:,.3f} GB, the largest {largest / 1e9:,.3f} GB; "
            f"free on the disk of {folder}: {free / 1e9:,.3f} GB"
        )
    if needed > free:
        raise ValueError(
            f"the disk of {folder} has {free / 1e9:,.2f} GB free, but {needed / 1e9:,.2f} GB are needed: make room or "
            "choose another disk"
        )


class Progress:
    """Bytes done, speed and time left on stderr: a line redrawn on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._start = self._last = time.monotonic()
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Counts `count` more bytes; for any thread."""
        with self._lock:
            self._advance(count)

    def _advance(self, count: int) -> None:
        if self._done >= self._total:
            return
        self._done += count
        now, share = time.monotonic(), min(self._done / self._total, 1.0)
        if now - self._last < (0.2 if self._live else 10) and share < 1:
            return
        self._last = now
        elapsed = max(now - self._start, 1e-9)
        text = (
            f"{self._what}: {share:4.0%}  {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, "
            f"{self._done / elapsed / 1e6:,.0f} MB/s, {elapsed / share - elapsed:.0f} s left"
        )
        line, end = (f"\r{text}   ", "" if share < 1 else "\n") if self._live else (text, "\n")
        print(line, end=end, file=sys.stderr, flush=True)


def model_of(args: Namespace, folder: Path, vocab_size: int | None = None) -> ModelConfig:
    """The model that the arguments stored in a checkpoint describe. Raises ValueError naming the folder."""
    try:
        return model_config_from_args(args, vocab_size)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def describe_training(args: object, model: ModelConfig, dtype: str, folder: Path) -> Description:
    """What the training arguments stored in a checkpoint say of it, in tensors of `dtype`."""

    def stored(name: str, kind: type[_T]) -> _T | None:
        value = getattr(args, name, None)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{folder}: its argument {name} must be of type {kind.__name__}, got {value!r}")
        return value

    return Description(
        model=replace(model, params_dtype=config_dtype(dtype)),
        dtype=dtype,
        folder=folder,
        seq_length=stored("seq_length", int) or model.max_position_embeddings,
        sliding_window=stored("sliding_window", int),
        tokenizer_type=stored("tokenizer_type", str),
        tokenizer_model=stored("tokenizer_model", str),
        vocab_file=stored("vocab_file", str),
        merge_file=stored("merge_file", str),
    )


def saved_sizes(args: object) -> list[int]:
    """Tensor-, pipeline- and expert-parallel size of the run that saved a checkpoint with these arguments."""
    return [getattr(args, f"{kind}_model_parallel_size", None) or 1 for kind in ("tensor", "pipeline", "expert")]


def with_vocabulary(model: ModelConfig, padded: int, fallback: int | None) -> ModelConfig:
    """`model` with its true vocabulary size, which is `fallback`, or else all `padded` entries, if it has none yet.

    Raises ValueError if it is larger than the padded one.
    """
    if model.vocab_size is None and fallback is not None:
        model = replace(model, vocab_size=fallback)
    if model.vocab_size is None:
        print(
            f"warning: the checkpoint only knows its padded vocabulary size: all {padded} entries are taken "
            "as real; give the true size with --true-vocab-size",
            file=sys.stderr,
        )
        model = replace(model, vocab_size=padded)
    assert model.vocab_size is not None
    if model.vocab_size > padded > 0:
        raise ValueError(f"the vocabulary has {model.vocab_size} entries but the embedding {padded} rows")
    return model


def check_counts(layers: int, experts: int, tensors: int, where: Path) -> None:
    """Raises ValueError if experts have far more weights than there are tensors, before each of them is looked for."""
    least = layers * experts * 2
    if least > max(tensors, 100_000):
        raise ValueError(
            f"{where} holds {tensors} tensors, but {layers} layers of {experts} experts, which its arguments ask for, "
            f"have at least {least}: files are missing, or the arguments are wrong"
        )


def config_dtype(dtype: str) -> Literal["float32", "bfloat16", "float64"]:
    """The type `ModelConfig` gets for weights of type `dtype`: float16, which it does not have, widens to float32."""
    return dtype if dtype in ("bfloat16", "float64") else "float32"  # type: ignore[return-value]


def model_bytes(model: ModelConfig, dtype: str) -> int:
    """Size of all weights without vocabulary padding."""
    return mixtral_table(model).elements * STORED_AS[dtype].itemsize


def common_dtype(dtypes: dict[str, str], requested: str | None) -> str:
    """`requested`, or else the one type that all tensors have. Raises ValueError naming a tensor that differs."""
    if requested is not None:
        return requested
    first_name, first = next(iter(dtypes.items()))
    for name, dtype in dtypes.items():
        if dtype != first:
            raise ValueError(
                f"{name} is {dtype} but {first_name} is {first}: choose one type for all with --params-dtype"
            )
    return first


def list_some(names: list[str]) -> str:
    """The first few of `names` and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def byte_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB, 2GiB or 1000 (an argparse type)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    upper = text.strip().upper()
    unit = next((unit for unit in ("KIB", "MIB", "GIB", "KB", "MB", "GB", "TB", "B") if upper.endswith(unit)), "")
    try:
        size = int(float(upper.removesuffix(unit)) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size
