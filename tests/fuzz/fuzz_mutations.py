"""Damage to a file's bytes and, where it is JSON, to its structure; all of it drawn by a seeded generator."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

_MOST_BYTES = 1 << 20
_EDGES = (
    0,
    1,
    -1,
    2,
    7,
    255,
    65535,
    1 << 24,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    -1 << 63,
)
_TEXTS = (
    "",
    " ",
    "\0",
    "x",
    "</s>",
    "..",
    "../x",
    "/etc/passwd",
    "1",
    "-1",
    "9" * 5000,
    "\ud800",
    "\x1b]0;x\x07",
    "é",
    "NaN",
)
_VALUES: tuple[Any, ...] = (
    None, True, False, *_EDGES, 1 << 70, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), *_TEXTS,
    [], {}, [None], [0], ["x"], {"": None}, {"x": []}, {"content": "x"}, [[]],
)  # fmt: skip
_NUMBER = re.compile(rb"-?[0-9]+")


def mutate(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """One to four mutations of a file; `others` are files to take pieces from."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        changed = _mutate_json(draw, content) if draw.random() < 0.6 else None
        content = draw.choice(_BYTE_MUTATIONS)(draw, content, others) if changed is None else changed
    return content[:_MOST_BYTES]


def _place(draw: random.Random, content: bytes) -> int:
    """Somewhere; headers are shorter than what follows and matter more."""
    return draw.randrange(min(len(content), 64) if draw.random() < 0.3 else len(content)) if content else 0


def _flip(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at = _place(draw, content)
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :] if content else content


def _set(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at = _place(draw, content)
    return content[:at] + bytes([draw.choice((0, 10, 34, 92, 127, 128, 255, draw.randrange(256)))]) + content[at + 1 :]


def _truncate(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    return content[: _place(draw, content)]


def _cut(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at = _place(draw, content)
    return content[:at] + content[at + draw.choice((1, 2, 4, 8, draw.randrange(1, 200))) :]


def _insert(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at = _place(draw, content)
    return content[:at] + draw.randbytes(draw.choice((1, 2, 4, 8, 60))) + content[at:]


def _repeat(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    at, size = _place(draw, content), draw.choice((1, 4, 16, 100, 1000))
    return content[:at] + content[at : at + size] * draw.choice((2, 10, 1000, 50_000)) + content[at:]


def _splice(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    other = draw.choice(others) if others else content
    start, at = _place(draw, other), _place(draw, content)
    piece = other[start : start + draw.choice((1, 8, 64, 1024))]
    return content[:at] + piece + content[at + (len(piece) if draw.random() < 0.5 else 0) :]


def _integer(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """A binary number of 2, 4 or 8 bytes set to an edge, or changed a little."""
    size, order = draw.choice((2, 4, 8)), draw.choice(("little", "little", "big"))
    at = _place(draw, content)
    old = int.from_bytes(content[at : at + size], order)  # type: ignore[arg-type]
    new = draw.choice((*_EDGES, old + 1, old - 1, old * 2, old + len(content))) % (1 << 8 * size)
    return content[:at] + new.to_bytes(size, order) + content[at + size :]  # type: ignore[arg-type]


def _decimal(draw: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """A number in text set to an edge."""
    found = list(_NUMBER.finditer(content[: 1 << 16]))
    if not found:
        return content
    match = draw.choice(found)
    new = draw.choice((*(str(edge) for edge in _EDGES), "1e9", "1e400", "nan", "0.5", "9" * 5000, "", "٣"))
    return content[: match.start()] + new.encode() + content[match.end() :]


_BYTE_MUTATIONS: tuple[Callable[[random.Random, bytes, list[bytes]], bytes], ...] = (
    _flip, _flip, _set, _truncate, _cut, _insert, _repeat, _splice, _integer, _integer, _decimal,
)  # fmt: skip


def _mutate_json(draw: random.Random, content: bytes) -> bytes | None:
    """The file with another structure; None if it is not JSON."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    places = _places(value, 20_000)
    if not places:
        value = draw.choice(_VALUES)
    else:
        # What is near the root decides more than the thousandth entry of a vocabulary.
        container, key = draw.choice(places[:200] if draw.random() < 0.7 else places)
        _change(draw, container, key, places)
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _places(value: Any, most: int) -> list[tuple[Any, Any]]:
    """Containers with the keys of what is in them, breadth first."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    for container in waiting:
        if isinstance(container, dict | list):
            keys = list(container) if isinstance(container, dict) else range(len(container))
            found += [(container, key) for key in keys]
            waiting += [container[key] for key in keys]
        if len(found) > most:
            break
    return found


def _change(draw: random.Random, container: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    kind = draw.random()
    if kind < 0.5:
        container[key] = draw.choice(_VALUES)
    elif kind < 0.6:
        del container[key]
    elif kind < 0.7:
        other, place = draw.choice(places)
        container[key] = json.loads(json.dumps(other[place]))
    elif kind < 0.75:
        for _ in range(draw.choice((1, 10, 2000))):
            container[key] = [container[key]] if draw.random() < 0.5 else {"x": container[key]}
    elif isinstance(container, list):
        container[key:key] = [container[key]] * draw.choice((1, 2, 1000))
    elif kind < 0.9:
        container[draw.choice((*_TEXTS, str(draw.choice(_EDGES)), *list(container)[:10]))] = container.pop(key)
    else:
        container[draw.choice((*_TEXTS, key + "x"))] = container[key]
