"""A pickle read as data: a stack machine that knows what `torch.save` writes, within bounds set before it begins.

Python's own unpickler allocates what a file claims (`bytearray(5 GB)`, a text of 4 GB, a memo of 2^32 places) before it
looks whether that is there, and hashes or copies structures that grow exponentially. Here nothing is larger than what
the file spells out.
"""

import struct
from collections.abc import Callable
from mmap import mmap
from pickle import UnpicklingError
from typing import Any

_MOST_DEPTH = 100
_MARK = object()
_WHOLE = 1 << 60
"""Integers below have different hashes, so that a dictionary of them cannot be made slow."""


class EndsEarlyError(UnpicklingError):
    """A pickle that is cut short."""


class PickleMachine:
    """Runs one pickle of protocol 2 or newer.

    `find` says what a global name stands for and `storage` what a persistent identifier does; `call` is given what
    the pickle calls, and `set_state` an object and its state. What they copy they account for with `spend`.
    """

    def __init__(
        self,
        data: "bytes | mmap",
        position: int,
        operations: int,
        find: Callable[[str, str], Any],
        storage: Callable[[Any], Any],
        call: Callable[[Any, tuple[Any, ...]], Any],
        set_state: Callable[[Any, Any], None],
    ) -> None:
        self._data, self.position = data, position
        self._operations = operations
        self._find, self._storage, self._call, self._set_state = find, storage, call, set_state
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._left = len(data)

    def run(self) -> Any:
        """The object; `position` is then behind the pickle. Raises UnpicklingError for whatever is wrong with it."""
        for done in range(self._operations):
            code = self._take(1)
            if code == b".":
                value = self._pop()
                check_tree(value, 8 * (done + 1))
                return value
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise UnpicklingError(f"operation {code!r}")
            operation(self)
        raise UnpicklingError(f"more than {self._operations} operations")

    def spend(self, count: int) -> None:
        """Accounts for `count` elements that are copied: each of them is spelled out in the file only once."""
        self._left -= count
        if self._left < 0:
            raise UnpicklingError("copies of copies")

    def _take(self, count: int) -> bytes:
        taken = self._data[self.position : self.position + count]
        if len(taken) < count:
            raise EndsEarlyError("it ends early")
        self.position += count
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + 1000)
        if end < 0:
            raise UnpicklingError("a name without an end")
        return self._take(end + 1 - self.position)[:-1].decode("utf-8")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise UnpicklingError("an empty stack")
        return self._stack.pop()

    def _several(self, count: int) -> tuple[Any, ...]:
        return tuple(self._pop() for _ in range(count))[::-1]

    def _marked(self) -> list[Any]:
        values = []
        while self._stack and self._stack[-1] is not _MARK:
            values.append(self._stack.pop())
        if not self._stack:
            raise UnpicklingError("no mark")
        self._stack.pop()
        return values[::-1]

    def _top(self, kind: type) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise UnpicklingError(f"no {kind.__name__} to add to")
        return self._stack[-1]

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[checked_key(key)] = value

    def _add_members(self) -> None:
        members = self._marked()
        self._top(set).update(map(checked_key, members))

    def _recall(self, number: int) -> None:
        if number not in self._memo:
            raise UnpicklingError("nothing was kept there")
        self._push(self._memo[number])

    def _keep(self, number: int) -> None:
        value = self._pop()
        self._push(value)
        self._memo[number] = value

    def _named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnpicklingError("a name that is no text")
        self._push(self._find(module, name))

    def _reduce(self) -> None:
        function, arguments = self._several(2)
        if not isinstance(arguments, tuple):
            raise UnpicklingError("arguments that are no tuple")
        self._push(self._call(function, arguments))

    def _build(self) -> None:
        state = self._pop()
        if not self._stack:
            raise UnpicklingError("an empty stack")
        self._set_state(self._stack[-1], state)

    def _text(self, form: str) -> None:
        self._push(self._take(self._number(form)).decode("utf-8", "surrogatepass"))

    def _bytes(self, form: str) -> None:
        self._push(self._take(self._number(form)))


def checked_key(key: object) -> Any:
    """`key` of a dictionary or member of a set. Raises UnpicklingError unless hashing it is cheap and even."""
    if (isinstance(key, int) and abs(key) >= _WHOLE) or isinstance(key, float | tuple) or type(key).__hash__ is None:
        raise UnpicklingError(f"a key of type {type(key).__name__}")
    return key


def check_tree(value: Any, most: int) -> None:
    """Raises UnpicklingError if `value`, walked as a tree, is deep or of more than `most` parts."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, dict):
            inner: Any = part.values()
        elif isinstance(part, list | tuple | set):
            inner = part
        else:
            inner = getattr(part, "__dict__", {}).values() if not isinstance(part, type) else ()
        seen += 1 + len(inner)
        if seen > most or depth > _MOST_DEPTH:
            raise UnpicklingError("structures within structures without end")
        waiting += [(each, depth + 1) for each in inner if not isinstance(each, str | int | float)]


def _protocol(machine: PickleMachine) -> None:
    if machine._take(1)[0] > 5:
        raise UnpicklingError("an unknown protocol")


_OPERATIONS: dict[bytes, Callable[[PickleMachine], object]] = {
    b"\x80": _protocol,
    b"\x95": lambda m: m._number("<Q"),
    b"(": lambda m: m._push(_MARK),
    b"0": PickleMachine._pop,
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._take(1)[0]),
    b"M": lambda m: m._push(m._number("<H")),
    b"\x8a": lambda m: m._push(int.from_bytes(m._take(m._take(1)[0]), "little", signed=True)),
    b"G": lambda m: m._push(m._number(">d")),
    b"X": lambda m: m._text("<I"),
    b"\x8c": lambda m: m._text("<B"),
    b"B": lambda m: m._bytes("<I"),
    b"C": lambda m: m._bytes("<B"),
    b"\x8e": lambda m: m._bytes("<Q"),
    b"]": lambda m: m._push([]),
    b"}": lambda m: m._push({}),
    b")": lambda m: m._push(()),
    b"\x8f": lambda m: m._push(set()),
    b"a": lambda m: m._append([m._pop()]),
    b"e": lambda m: m._append(m._marked()),
    b"s": lambda m: m._set_items(list(m._several(2))),
    b"u": lambda m: m._set_items(m._marked()),
    b"\x90": PickleMachine._add_members,
    b"t": lambda m: m._push(tuple(m._marked())),
    b"\x85": lambda m: m._push(m._several(1)),
    b"\x86": lambda m: m._push(m._several(2)),
    b"\x87": lambda m: m._push(m._several(3)),
    b"c": lambda m: m._named(m._line(), m._line()),
    b"\x93": lambda m: m._named(*m._several(2)),
    b"R": PickleMachine._reduce,
    b"\x81": PickleMachine._reduce,
    b"b": PickleMachine._build,
    b"q": lambda m: m._keep(m._take(1)[0]),
    b"r": lambda m: m._keep(m._number("<I")),
    b"\x94": lambda m: m._keep(len(m._memo)),
    b"h": lambda m: m._recall(m._take(1)[0]),
    b"j": lambda m: m._recall(m._number("<I")),
    b"Q": lambda m: m._push(m._storage(m._pop())),
}
