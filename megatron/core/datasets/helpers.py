"""Where the samples of an epoch begin: in C++ where that was built, else in NumPy, with the same results."""

import importlib
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

helpers_cpp: ModuleType | None
try:
    helpers_cpp = importlib.import_module("megatron.core.datasets.helpers_cpp")
except ImportError:
    helpers_cpp = None
# An extension that was built from another version of the source is ignored, too.
if not hasattr(helpers_cpp, "sample_starts"):
    helpers_cpp = None

_BLOCK = 1 << 22


def smallest_integer(limit: int) -> np.dtype:
    """int32, or int64 if `limit` does not fit it."""
    return np.dtype(np.int32 if limit <= np.iinfo(np.int32).max else np.int64)


def sample_starts(
    lengths: NDArray[np.int32], order: NDArray[np.integer], seq_length: int, first: int, tokens: int
) -> NDArray[np.integer]:
    """Places of the tokens `first`, `first + seq_length`, ... of the documents concatenated in `order`.

    Row i of the result [rows, 2] is (position in `order`, offset in that document) of token first + i * seq_length, for
    all of them below `tokens`, the number of tokens in all; int32 where `order` is. Raises ValueError if there are
    fewer tokens.
    """
    assert seq_length > 0 and first >= 0, (seq_length, first)
    if helpers_cpp is None or order.dtype != np.int32:
        return sample_starts_numpy(lengths, order, seq_length, first, tokens)
    lengths = np.require(lengths, np.int32, ["C", "A"])
    return helpers_cpp.sample_starts(lengths, np.require(order, np.int32, ["C", "A"]), seq_length, first, tokens)


def sample_starts_numpy(
    lengths: NDArray[np.int32], order: NDArray[np.integer], seq_length: int, first: int, tokens: int
) -> NDArray[np.integer]:
    """The NumPy fallback of `sample_starts`."""
    rows = np.empty((max(0, -(-(tokens - first) // seq_length)), 2), order.dtype)
    filled = begin = 0
    for start in range(0, len(order), _BLOCK):
        block = lengths[order[start : start + _BLOCK]]
        ends = np.cumsum(block, dtype=np.int64) + begin
        begin = int(ends[-1])
        wanted = np.arange(first + filled * seq_length, min(begin, tokens), seq_length)
        positions = np.searchsorted(ends, wanted, side="right")
        part = rows[filled : filled + len(wanted)]
        part[:, 0] = start + positions
        part[:, 1] = wanted - (ends[positions] - block[positions])
        filled += len(wanted)
    if filled < len(rows):
        raise ValueError(f"the documents hold {begin} tokens, fewer than {tokens}")
    return rows
