"""Parsers with planted faults, which a hunt has to find."""

import json
from pathlib import Path

from fuzz_testing import Target


def _seed(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps({"kind": "good", "size": 3}))


def _raises(folder: Path) -> None:
    content = json.loads((folder / "a.json").read_text(errors="ignore"))
    if not isinstance(content, dict):
        raise ValueError("a.json must hold an object")
    content["kind"].lower()


def _size(folder: Path) -> int:
    """The number in the file; anything else counts as none."""
    try:
        return int(json.loads((folder / "a.json").read_bytes())["size"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return 0


def _spins(folder: Path) -> None:
    while _size(folder) > 100:
        pass


def _allocates(folder: Path) -> None:
    bytearray(min(max(_size(folder), 0), 400 << 20))


def _refuses(folder: Path) -> None:
    if _size(folder) != 3:
        raise ValueError("a.json: size must be 3")


_PARSERS = {"raises": _raises, "spins": _spins, "allocates": _allocates, "refuses": _refuses}
TARGETS = {name: Target([_seed], parse, seconds=0.5) for name, parse in _PARSERS.items()}
