"""What the threads of this process wait for, said where they wait, so that a watch can tell waiting from work."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

_waits: dict[int, str] = {}


@contextmanager
def waiting(what: Literal["other ranks", "the device"] = "other ranks") -> Iterator[None]:
    """Whatever this thread does in the block counts as waiting."""
    thread = threading.get_ident()
    outer = _waits.get(thread)
    _waits[thread] = what
    try:
        yield
    finally:
        if outer is None:
            del _waits[thread]
        else:
            _waits[thread] = outer


def waits() -> dict[int, str]:
    """What each waiting thread waits for, by its identifier."""
    return _waits.copy()


def to_host(tensor: Tensor) -> Tensor:
    """The tensor in the host's memory; this waits for its device."""
    with waiting("the device"):
        return tensor.cpu()
