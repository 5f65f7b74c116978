"""What the processes of a job agree on in its store, before they can send each other messages."""

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from megatron.core.atomic_files import error_sentence

T = TypeVar("T")

# Time between two looks of the first rank at who has come, in seconds.
_INTERVAL = 0.1
_GO = "go"


def agree_on_round(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that exactly the processes of this start share, among whatever earlier ones left in `store`; collective.

    torchrun keeps the store over restarts, but each of its agents counts only its own. So every process greets under
    a name that it has just made, the first rank answers every greeting with the round, also those of processes that
    have died, and is done when each rank has confirmed this round. Raises ValueError if some do not come in time.
    """
    mine = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        answered: dict[int, bytes] = {}
        missing = set(range(1, world_size))
        while missing:
            for other in sorted(missing):
                if store.check([f"hello/{other}"]):
                    greeting = store.get(f"hello/{other}")
                    if answered.get(other) != greeting:
                        store.set(f"round for {greeting.decode()}", mine)
                        answered[other] = greeting
                if store.check([f"{mine}/{other}"]):
                    missing.remove(other)
            if missing and time.monotonic() > deadline:
                raise ValueError(_not_there(f"rank {min(missing)}" + (" and others" if len(missing) > 1 else "")))
            time.sleep(_INTERVAL if missing else 0)
        return mine
    store.set(f"hello/{rank}", mine)
    answer = f"round for {mine}"
    while not store.check([answer]):
        if time.monotonic() > deadline:
            raise ValueError(_not_there("the first rank"))
        time.sleep(_INTERVAL)
    name = store.get(answer).decode()
    store.set(f"{name}/{rank}", "")
    return name


def all_or_none(action: Callable[[], T], store: dist.Store, rank: int, world_size: int) -> T:
    """Runs `action` on every rank; what it raises on any ends the start of all of them at once. Collective.

    A rank on which it went well raises ValueError with the word of the first that failed. `store` is this start's own,
    and its timeout bounds the wait for the others.
    """
    try:
        result = action()
    except Exception as error:
        refuse(error, store, rank)
        raise
    if store.add("ready", 1) == world_size:
        store.compare_set("start", "", _GO)
    try:
        verdict = store.get("start").decode()
    except dist.DistStoreError as error:
        raise ValueError(
            f"of {world_size} ranks only {store.add('ready', 0)} came to the start of the job: look at the output of "
            "the machines of the others"
        ) from error
    if verdict != _GO:
        raise ValueError(verdict)
    return result


def refuse(error: Exception, store: dist.Store, rank: int) -> None:
    """Ends the start of all ranks that take part in `all_or_none`, unless another has done so."""
    if isinstance(error, ValueError | OSError):
        word = error_sentence(error)
    else:
        word = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    store.compare_set("start", "", f"rank {rank}: {word}")


def _not_there(who: str) -> str:
    return (
        f"{who} did not come: look at the output of that machine's torchrun; if one machine was started again, the "
        "others must be as well, which torchrun does only with --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
    )
