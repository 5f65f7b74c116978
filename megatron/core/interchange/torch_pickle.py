"""What a `.pt` file holds besides the tensors' bytes, read and written without torch and without running anything.

The names, shapes and places of the tensors in a `.pt` file are a pickle. Reading it as data is what torch's
`weights_only=True` does, and so does this: every name in it that is not listed here is refused, and what is listed
stands for inert values and nothing else, so that there is nothing a planted file could call.
"""

import math
import pickle
import re
import struct
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Any, NamedTuple

from megatron.core.interchange.pickle_machine import PickleMachine, checked_key

# NVIDIA's checkpoints keep Megatron's enumerations in `args`. They are read as inert objects; their modules are never
# imported. Any other foreign name is refused.
INERT_PREFIXES = ("megatron.", "transformer_engine.")
INERT_NAMES = ("signal.Signals",)
_STORAGES = {
    "FloatStorage": "float32", "BFloat16Storage": "bfloat16", "HalfStorage": "float16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip

_MOST_DIMENSIONS = 64  # torch's own limit
_MOST_ELEMENTS = 1 << 48
_OLD_MAGIC = 0x1950A86A20F9469CFC6C


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


class _Storage(NamedTuple):
    record: str
    dtype: str
    elements: int


class _Reader:
    """Gives names, storages and tensors their meaning; knows the names below only."""

    def __init__(
        self,
        data: "bytes | mmap",
        position: int,
        sizes: Callable[[str], int],
        operations: int,
        foreign: bool = False,
    ) -> None:
        self.machine = PickleMachine(data, position, operations, self._find, self._storage, self._call, self._set_state)
        self.storages: dict[str, int] = {}
        """Bytes of each storage that the pickle names."""
        self._sizes, self._foreign = sizes, foreign
        self._namespace = type("Namespace", (Namespace,), {})  # a new class, which nothing can alter
        self._known: dict[str, object] = {
            "argparse.Namespace": self._namespace,
            "collections.OrderedDict": self._ordered,
            "torch.Size": self._size,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.device": self._device,
            "_codecs.encode": self._encode,
            "builtins.bytearray": self._bytearray,
            "builtins.set": self._set,
            "__builtin__.bytearray": self._bytearray,
            "__builtin__.set": self._set,
        }

    def _find(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._known:
            return self._known[full]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and re.fullmatch(r"(bfloat|float|complex|uint|int|bool)[0-9]*(_\w+)?", name):
            return full
        if self._foreign or full.startswith(INERT_PREFIXES) or full in INERT_NAMES:
            return Inert
        raise pickle.UnpicklingError(f"GLOBAL {full}")

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function is Inert:
            return Inert()
        if function is self._namespace and not arguments:
            return self._namespace()
        if function not in self._known.values() or function is self._namespace:
            raise pickle.UnpicklingError("a call")
        return function(*arguments)

    def _set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, self._namespace):
            if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
                raise pickle.UnpicklingError("a state")
            self.machine.spend(len(state))
            vars(target).update(state)
        elif not isinstance(target, Inert | OrderedDict):
            raise pickle.UnpicklingError("a state")

    def _storage(self, identifier: Any) -> _Storage:
        kind, dtype, key, _, elements, *view = identifier
        if kind != "storage" or not isinstance(dtype, str) or not re.fullmatch(r"[0-9]{1,20}", key) or any(view):
            raise pickle.UnpicklingError("a storage")
        record = f"data/{key}"
        if not isinstance(elements, int) or not 0 <= elements * itemsize(dtype) <= self._sizes(record):
            raise pickle.UnpicklingError(f"a storage beyond its record {record}")
        self.storages[record] = max(self.storages.get(record, 0), elements * itemsize(dtype))
        return _Storage(record, dtype, elements)

    def _tensor(self, storage: _Storage, start: int, shape: Any, stride: Any, *_: object) -> TensorEntry:
        return self._typed_tensor(storage, start, shape, stride, False, None, storage.dtype)

    def _typed_tensor(
        self, storage: _Storage, start: int, shape: Any, stride: Any, *rest: Any
    ) -> TensorEntry:  # a gradient's flag, hooks, the type, and what else there may be
        dtype = rest[2].removeprefix("torch.")
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise pickle.UnpicklingError("a tensor")
        elements = storage.elements * itemsize(storage.dtype) // itemsize(dtype)
        if not _fits(elements, start, shape, stride):
            raise pickle.UnpicklingError(f"a tensor that is not within its record {storage.record}")
        return TensorEntry(storage.record, dtype, shape, stride, start)

    def _parameter(self, tensor: object, *_: object) -> object:
        return tensor

    def _device(self, kind: str, index: int = 0) -> str:
        return f"{kind:.20}:{index:d}" if index else f"{kind:.20}"

    def _size(self, shape: Any) -> tuple[Any, ...]:
        self.machine.spend(len(shape))
        return tuple(shape)

    def _ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        self.machine.spend(len(items))
        return OrderedDict((checked_key(key), value) for key, value in items)

    def _set(self, members: Any = ()) -> set[Any]:
        self.machine.spend(len(members))
        return set(map(checked_key, members))

    def _encode(self, text: str, _: str = "latin1") -> bytes:
        self.machine.spend(len(text))
        return text.encode("latin1")

    def _bytearray(self, content: "bytes | str" = b"", _: str = "latin1") -> bytearray:
        if not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("an array of bytes that are not there")
        self.machine.spend(len(content))
        return bytearray(content if isinstance(content, bytes) else content.encode("latin1"))


def itemsize(dtype: str) -> int:
    """Bytes of an element of a type that torch calls `dtype`."""
    digits = re.search("[0-9]+", dtype)
    return max(1, int(digits[0]) // 8) if digits else 1


def _fits(elements: int, start: Any, shape: tuple[Any, ...], stride: tuple[Any, ...]) -> bool:
    """Whether a tensor lies within the `elements` of its storage and, written out, has no more than those."""
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        return False
    if not all(type(number) is int and 0 <= number < _MOST_ELEMENTS for number in (start, *shape, *stride)):
        return False
    if 0 in shape:
        return start <= elements and math.prod(max(size, 1) for size in shape) < _MOST_ELEMENTS
    last = start + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return last < elements and math.prod(shape) <= elements


def read_pickle(data: bytes, records: Mapping[str, int], foreign: bool = False) -> Any:
    """The object in a `.pt` file's pickle, tensors as `TensorEntry`.

    `records` has the bytes of each record, which every tensor has to lie within. Raises pickle.UnpicklingError with
    `GLOBAL` and the name for anything that is not known here to be harmless, and whatever else a pickle that was not
    written by torch leads to. With `foreign` such names stand for objects that keep nothing, instead.
    """

    def size(record: str) -> int:
        if record not in records:
            raise pickle.UnpicklingError(f"a storage without its record {record}")
        return records[record]

    return _Reader(data, 0, size, _operations(records.values()), foreign).machine.run()


def check_old_pickles(data: mmap) -> None:
    """Checks the pickles of a file of before torch 1.6, which is no archive, as `read_pickle` does."""
    position, most = 0, _operations(())
    for number in range(5):  # a magic number, the version, the machine, the content, the names of the storages
        reader = _Reader(data, position, lambda _: len(data), most)
        value = reader.machine.run()
        position = reader.machine.position
        if number == 0 and value != _OLD_MAGIC:
            raise pickle.UnpicklingError("no file of torch")
        if sum(reader.storages.values()) > len(data):
            raise pickle.UnpicklingError("storages beyond the file's end")


def _operations(sizes: Collection[int]) -> int:
    """How many operations a file's pickle may have: what 15,000 tensors take, and more where there are more tensors."""
    return 500_000 + 32 * min(len(sizes), sum(sizes) // 256)


_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items() if name != "UntypedStorage"}


@dataclass(frozen=True)
class Named:
    """Something that the reader of a pickle finds in its own module."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What the reader of a pickle gets by a call of `function`."""

    function: Named
    arguments: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of `kind`, made without calling anything and then given its `state`."""

    kind: Named
    state: object


def write_pickle(value: object) -> bytes:
    """The pickle of plain values, dictionaries, lists, tuples, `Namespace`, tensors as `TensorEntry`, and the above."""
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
    if isinstance(value, Named):
        return _name(value.module, value.name)
    if isinstance(value, Call):
        return _encoded(value.function) + _encoded(value.arguments) + b"R"
    if isinstance(value, Instance):
        return _encoded(value.kind) + b")\x81" + _encoded(value.state) + b"b"
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
