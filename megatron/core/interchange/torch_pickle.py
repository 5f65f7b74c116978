"""What a `.pt` file holds besides the tensors' bytes, read and written without torch and without running anything.

The names, shapes and places of the tensors in a `.pt` file are a pickle. Reading it as data is what torch's
`weights_only=True` does, and so does this: every name in it that is not listed here is refused, and what is listed
stands for inert values and nothing else, so that there is nothing a planted file could call.
"""

import pickle
import re
import struct
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from typing import Any

# NVIDIA's checkpoints keep enumerations of its own in `args`. They are read as inert objects; their modules are never
# imported. Any other foreign name is refused.
INERT_PREFIXES = ("megatron.", "transformer_engine.")
INERT_NAMES = ("signal.Signals",)
_STORAGES = {
    "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the pickle describes it."""

    record: str
    """Name of the archive's record with its bytes, without the archive's own name: `data/0`."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""
    start: int = 0
    """Of its first element in the record, in elements."""


class Inert:
    """Stands for an object of a class that is not ours: keeps nothing, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Reader(pickle.Unpickler):
    """An unpickler that knows the names below only."""

    def __init__(self, data: bytes) -> None:
        super().__init__(BytesIO(data))
        self._known: dict[str, object] = {
            "argparse.Namespace": type("Namespace", (Namespace,), {}),  # a class of its own, which nothing can alter
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.device": self._device,
            "_codecs.encode": self._encode,
            "builtins.bytearray": bytearray,
            "builtins.set": set,
            "__builtin__.bytearray": bytearray,
            "__builtin__.set": set,
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and re.fullmatch(r"(bfloat|float|complex|uint|int|bool)[0-9]*(_\w+)?", name):
            return full
        if full.startswith(INERT_PREFIXES) or full in INERT_NAMES:
            return type(name, (Inert,), {})
        raise pickle.UnpicklingError(f"GLOBAL {full}")

    def persistent_load(self, identifier: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = identifier
        if kind != "storage" or not isinstance(dtype, str) or not re.fullmatch(r"[0-9]+", key):
            raise pickle.UnpicklingError(f"a storage named {key!r}")
        return f"data/{key}", dtype

    def _tensor(self, storage: tuple[str, str], start: int, shape: Any, stride: Any, *_: object) -> TensorEntry:
        return self._typed_tensor(storage, start, shape, stride, False, None, storage[1])

    def _typed_tensor(
        self, storage: tuple[str, str], start: int, shape: Any, stride: Any, *rest: Any
    ) -> TensorEntry:  # a gradient's flag, hooks, the type, and what else there may be
        numbers, dtype = (*shape, *stride, start), rest[2]
        if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError(f"a tensor of shape {shape!r}")
        return TensorEntry(storage[0], dtype.removeprefix("torch."), tuple(shape), tuple(stride), start)

    def _parameter(self, tensor: object, *_: object) -> object:
        return tensor

    def _device(self, *place: object) -> str:
        return ":".join(map(str, place))

    def _encode(self, text: str, _: str) -> bytes:
        return text.encode("latin1")


def read_pickle(data: bytes) -> Any:
    """The object in a `.pt` file's pickle, tensors as `TensorEntry`.

    Raises pickle.UnpicklingError with `GLOBAL` and the name for anything that is not known here to be harmless, and
    whatever else pickle raises for damaged data.
    """
    return _Reader(data).load()


_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items() if name != "UntypedStorage"}


def write_pickle(value: object) -> bytes:
    """The pickle of plain values, dictionaries, lists, tuples, `Namespace`, and tensors as `TensorEntry`."""
    return b"\x80\x02" + _encoded(value) + b"."


def _encoded(value: object) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        number = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(number)]) + number
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode("utf-8")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_encoded, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_encoded, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_encoded(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, Namespace):
        return _name("argparse", "Namespace") + b")\x81" + _encoded(vars(value)) + b"b"
    assert isinstance(value, TensorEntry), f"a {type(value).__name__} is not a plain value"
    elements = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
    storage = (
        b"(" + _encoded("storage") + _name("torch", _STORAGE_OF[value.dtype])
        + b"".join(map(_encoded, (value.record.removeprefix("data/"), "cpu", value.start + elements))) + b"tQ"
    )  # fmt: skip
    place = b"".join(map(_encoded, (value.start, value.shape, value.stride, False)))
    hooks = _name("collections", "OrderedDict") + b")R"
    return _name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + place + hooks + b"tR"


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")
