"""What a .safetensors file claims of itself, checked before anything is made of it."""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

from megatron.core.interchange.element_types import STORED_AS
from megatron.core.interchange.stored_tensor import StoredTensor
from megatron.core.text_files import DuplicateNameError, without_duplicates

DTYPE_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in DTYPE_NAMES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}
_LARGEST_HEADER = 8 << 20  # of 60,000 tensors
# A tensor has three brackets in more than fifty bytes; millions of empty lists would take seconds and much memory.
_BYTES_A_BRACKET = 12
_MOST_ELEMENTS, _MOST_DIMENSIONS = 1 << 56, 64


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name, sorted; together they are all of its data, and none overlaps another.

    Raises ValueError naming the file, and the tensor, if that is not so or a type is not supported.
    """
    try:
        return _read(path)
    except RecursionError:
        raise ValueError(f"cannot read {path}: its header is nested too deeply; download it again") from None
    except _DamageError as error:
        raise ValueError(f"cannot read {path}: {error}; download it again") from None


class _DamageError(Exception):
    """What is wrong with a header, in words."""


def _read(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _DamageError(f"its header is said to be of {length} bytes, but the file has {size}")
        if length > _LARGEST_HEADER:
            raise _DamageError(f"its header is of {length} bytes, more than that of any model")
        text = file.read(length)
    if text.count(b"[") + text.count(b"{") > length // _BYTES_A_BRACKET + 100:
        raise _DamageError("its header holds other things than tensors")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except DuplicateNameError as error:
        raise _DamageError(f"its header names {error} twice") from None
    except ValueError as error:
        raise _DamageError(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _DamageError("its header is not a JSON object")
    header.pop("__metadata__", None)
    found, ranges = {}, []
    for name in sorted(header):
        stored, begin, end = _tensor(path, name, header[name], 8 + length)
        found[name] = stored
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise _DamageError(f"{name} begins at byte {begin} of the data, but what is before it ends at {position}")
        position = end
    if position != size - 8 - length:
        raise _DamageError(f"its tensors are {position} bytes, but the file has {size - 8 - length} after the header")
    return found


def _tensor(path: Path, name: str, entry: Any, start: int) -> tuple[StoredTensor, int, int]:
    """A tensor, and the bytes of the data (from byte `start` of the file) that are its own."""
    if not name.isascii() or not name.isprintable():
        raise _DamageError(f"the name {ascii(name)[:100]} of a tensor has characters that no name has")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _DamageError(f"{name} must have dtype, shape and data_offsets, it is {reprlib.repr(entry)}")
    if not isinstance(entry["dtype"], str):
        raise _DamageError(f"the dtype of {name} is {reprlib.repr(entry['dtype'])}")
    shape, offsets = (_counts(name, field, entry[field]) for field in ("shape", "data_offsets"))
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(
            f"{name} in {path} is of type {entry['dtype'][:20]}: only floating types of at least 16 bits are "
            "supported; if the weights are quantized, use the unquantized model"
        )
    nbytes = math.prod(shape) * STORED_AS[dtype].itemsize
    if nbytes > _MOST_ELEMENTS:
        raise _DamageError(f"{name} has shape {reprlib.repr(shape)}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _DamageError(
            f"{name} has data_offsets {reprlib.repr(offsets)}, but {entry['dtype']} of shape {reprlib.repr(shape)} is "
            f"{nbytes} bytes"
        )
    return StoredTensor(path, tuple(shape), dtype, start + offsets[0]), offsets[0], offsets[1]


def _counts(name: str, field: str, values: Any) -> list[int]:
    """`values` if they are a short list of numbers of zero and more."""
    if (
        not isinstance(values, list)
        or len(values) > _MOST_DIMENSIONS
        or not all(type(value) is int and 0 <= value <= _MOST_ELEMENTS for value in values)
    ):
        raise _DamageError(f"{name} has {field} {reprlib.repr(values)}")
    return values
