"""What loaders give and savers take: a description of a checkpoint, and its weights one at a time.

A plugin is a file `loader_NAME.py` or `saver_NAME.py` with `add_arguments(parser)` and

    open_source(args) -> Source       (loader)
    save(source, args) -> None        (saver; the source is a CheckedSource)

The saver decides the order and the cut: it asks for each part of each weight once, in the order it writes them, and
calls `check_complete` before it puts its output in place.
"""

import sys
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from megatron.core.config import ModelConfig
from megatron.core.models.mixtral.hf_weights import WeightRule, mixtral_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a checkpoint holds, apart from its weights."""

    model: ModelConfig
    """Shape of the model, with its true vocabulary size."""
    dtype: torch.dtype
    """Type of every tensor the source gives."""
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


class Source(Protocol):
    """An opened checkpoint whose names, shapes and types have all been checked."""

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""

    def read(self, rule: WeightRule, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Part `rank` of `size` of one Megatron weight, in the description's type."""


class CheckedSource:
    """A source that is told which parts make a weight whole, and knows whether each was read exactly once."""

    def __init__(self, source: Source, progress: "Progress") -> None:
        self._source = source
        self._progress = progress
        self._read: dict[str, list[tuple[int, int]]] = {}

    @property
    def description(self) -> Description:
        """What the checkpoint holds."""
        return self._source.description

    def read(self, rule: WeightRule, rank: int = 0, size: int = 1) -> torch.Tensor:
        """Part `rank` of `size` of one weight; raises ValueError if it was read before."""
        parts = self._read.setdefault(rule.name, [])
        if (rank, size) in parts:
            raise ValueError(f"{rule.name}: part {rank} of {size} is written twice")
        tensor = self._source.read(rule, rank, size)
        parts.append((rank, size))
        self._progress.advance(tensor.numel() * tensor.element_size())
        return tensor

    def check_complete(self) -> None:
        """Raises ValueError naming the first weight of which not every part was read."""
        expected = {rule.name for rule in mixtral_weights(self.description.model)}
        for name in sorted(expected | set(self._read)):
            parts = self._read.get(name, [])
            sizes = {size for _, size in parts}
            if name not in expected or len(sizes) != 1 or {rank for rank, _ in parts} != set(range(sizes.pop())):
                raise ValueError(f"{name} was not written completely: parts (rank, of) {parts}")


class Progress:
    """Bytes done, speed and time left on stderr: a line redrawn on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, max(total, 1), 0
        self._start = self._last = time.monotonic()
        self._live = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        """Counts `count` more bytes."""
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


def config_dtype(dtype: torch.dtype) -> Literal["float32", "bfloat16", "float64"]:
    """The type `ModelConfig` gets for weights of type `dtype`: float16, which it does not have, widens to float32."""
    if dtype == torch.bfloat16:
        return "bfloat16"
    return "float64" if dtype == torch.float64 else "float32"


def model_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Size of all weights without vocabulary padding."""
    return sum(torch.Size(rule.shape).numel() for rule in mixtral_weights(model)) * dtype.itemsize


def common_dtype(dtypes: dict[str, torch.dtype], requested: str | None) -> torch.dtype:
    """`requested`, or else the one type that all tensors have. Raises ValueError naming a tensor that differs."""
    if requested is not None:
        return DTYPES[requested]
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
