"""Start-up: torch.distributed, and errors that all ranks share."""

import contextlib
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron.core import collectives
from megatron.core.atomic_files import allow_open_files, error_sentence
from megatron.core.parallel_state import ProcessGroups, build_process_groups, connect_control, network_error
from megatron.core.text_files import terminal_output
from megatron.training.config import Arguments
from megatron.training.device import take_device
from megatron.training.ending import Ending
from megatron.training.environment import Environment, read_environment
from megatron.training.heartbeat import Heartbeat
from megatron.training.loader import worker_killed
from megatron.training.logs.step_monitor import StepMonitor
from megatron.training.restarts import agree_on_round, all_or_none, refuse
from megatron.training.signals import INTERRUPTED, StoppedAtStart, StopSignal

T = TypeVar("T")
# How long a rank that has lost a connection waits for the word of the one that ended, in seconds.
_WORD_PATIENCE = 2.0
# How long a rank with an error that all share waits for the first one to report it, in seconds.
_SPEAKER_PATIENCE = 30.0
# How long one that cannot start tries to tell the other machines.
_REFUSAL_PATIENCE = timedelta(seconds=10)


def start_distributed(arguments: Arguments, environment: Environment) -> tuple[torch.device, ProcessGroups]:
    """Takes a device, joins the job and builds this process's groups.

    Raises ValueError on every rank if one of them gets no device.
    """
    torch.manual_seed(arguments.training.seed)
    if environment.world_size == 1:
        return take_device(arguments.training, environment, None), ProcessGroups()
    timeout = timedelta(minutes=arguments.training.distributed_timeout_minutes)
    store, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    # torchrun keeps one store over all restarts, in which the addresses of the processes that died would be found
    start = f"restart {environment.restarts}"
    if environment.machines > 1:  # each machine counts its own restarts
        start = agree_on_round(store, environment.rank, environment.world_size, timeout)
    store = dist.PrefixStore(start, store)
    device = all_or_none(
        lambda: take_device(arguments.training, environment, store), store, environment.rank, environment.world_size
    )
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=environment.rank,
            world_size=environment.world_size, timeout=timeout, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
    except RuntimeError as error:  # gloo's errors have no class of their own
        if device.type == "cuda" and not isinstance(error, dist.DistError):
            raise
        raise network_error(error) from error
    groups = build_process_groups(arguments.parallel, environment.rank, environment.world_size, timeout)
    connect_control(groups.control)
    return device, groups


def refuse_start(environment: Environment, error: Exception) -> None:
    """Tells ranks of other machines, which wait in `start_distributed`, that this one has not come so far.

    Without a word they would wait for the whole timeout, where the other machines have what this one lacks. Those of
    the first machine need none: the store ends with them.
    """
    if environment.machines == 1 or environment.rank < environment.local_world_size:
        return
    rank, world_size = environment.rank, environment.world_size
    with contextlib.suppress(Exception):  # they may not be there, for the same reason as this one
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_REFUSAL_PATIENCE))
        start = agree_on_round(store, rank, world_size, _REFUSAL_PATIENCE)
        refuse(error, dist.PrefixStore(start, store), rank)


def start_monitor(
    arguments: Arguments, groups: ProcessGroups, ending: Ending, stop_signal: StopSignal
) -> StepMonitor | None:
    """Watches the ranks of a job of several: names one that is stuck before the collectives time out, and ends this
    one when another has ended."""
    if groups.world.size == 1:
        return None
    limit = 0.8 * 60 * arguments.training.distributed_timeout_minutes
    store: Any = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    ending.join(store.clone())

    def report(text: str) -> None:
        with contextlib.suppress(OSError):  # which would end the watch
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    return StepMonitor(
        store.clone(), groups.world.rank, groups.world.size, limit, report, stopping=stop_signal.seconds,
        lost=lambda sentence: ending.leave(1, f"error: {sentence}"), look=ending.follow,
    )  # fmt: skip


def start_heartbeat(environment: Environment, groups: ProcessGroups, ending: Ending) -> Heartbeat | None:
    """Finds machines that are gone, in a job on several; of one machine its launcher watches the processes."""
    several = environment.machines > 1 or not environment.launched
    if groups.world.size == 1 or not several:
        return None
    speaks = environment.local_rank == 0
    store: Any = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    heartbeat = Heartbeat(
        store.clone(), groups.world.rank, groups.world.size,
        lambda sentence: ending.leave(1, f"error: {sentence}" if speaks else "", reason=sentence),
    )  # fmt: skip
    heartbeat.start()
    return heartbeat


class SharedError(ValueError):
    """An error that every rank raises; the first one reports it for all."""


def together(action: Callable[[], T], groups: ProcessGroups) -> T:
    """Runs `action` on every rank; if it raises ValueError or OSError on any, every rank raises SharedError.

    `action` must not communicate, since another rank may fail before it does.
    """
    message: str | None = None
    result: T | None = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        message = error_sentence(error)
    messages = [message]
    if groups.control.size > 1:
        messages = [None] * groups.control.size
        collectives.all_gather_object(messages, message, group=groups.control.handle)
    failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
    if failed:
        rank, text = failed[0]
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise SharedError(text if len(failed) == len(messages) else f"rank {rank}{others}: {text}")
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], T], groups: ProcessGroups) -> T:
    """Runs `action` on the first rank; every rank returns its result or raises its ValueError or OSError."""
    try:
        result = together(lambda: action() if groups.control.is_first else None, groups)
    except SharedError as error:
        raise SharedError(str(error).removeprefix("rank 0: ")) from None
    if groups.control.size > 1:
        shared = [result]
        collectives.broadcast_object_list(shared, src=0, group=groups.control.handle)
        result = shared[0]
    return result  # type: ignore[return-value]


def largest(values: tuple[float, ...], groups: ProcessGroups, device: torch.device | None = None) -> list[float]:
    """The largest of each value over all ranks, on every rank; collective.

    With a `device`, by the communicator that training itself uses there: for what is asked in steps, where gloo's
    messages from rank to rank would take long among thousands, and where no rank may keep the others waiting.
    """
    group = groups.control if device is None else groups.world
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    if group.size > 1:
        collectives.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group.handle)
    return numbers.tolist()  # type: ignore[no-any-return]


def print_once(groups: ProcessGroups, text: str) -> None:
    """Prints on the first rank; what cannot be printed, on a disk that is full for example, stops nothing."""
    if groups.world.is_first:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def run(main: Callable[[Environment, Ending, StopSignal], None]) -> None:
    """Runs the program; a ValueError ends every rank with status 1 and one sentence.

    The first rank speaks for an error that all share. Before the ranks know of each other, that is the first one of
    each machine; later, an error of one rank alone is reported by that rank, and the others end after it.
    """
    environment = read_environment()
    allow_open_files()
    if environment.rank != 0:
        logging.getLogger("megatron").setLevel(logging.ERROR)  # warnings are the same on every rank
    stop_signal = StopSignal()
    ending = Ending(environment.rank)
    ending.in_order.append(lambda: _leave_words(environment, stop_signal, said=True))
    with terminal_output(keep=False):
        _run(main, environment, ending, stop_signal)
    stop_signal.uninstall()
    _leave_words(environment, stop_signal, said=stop_signal.said)
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(
    main: Callable[[Environment, Ending, StopSignal], None],
    environment: Environment,
    ending: Ending,
    stop_signal: StopSignal,
) -> None:
    try:
        main(environment, ending, stop_signal)
    except (ValueError, OSError) as error:
        alone = dist.is_initialized() and not isinstance(error, SharedError)
        speaker = environment.rank == 0 if dist.is_initialized() else environment.local_rank == 0
        sentence = error_sentence(error)
        if alone or speaker:
            who = f"rank {environment.rank}: " if alone and environment.world_size > 1 else ""
            ending.leave(1, f"error: {who}{sentence}", reason=sentence)
        _await_speaker(ending, stop_signal)
        ending.leave(1, f"error: rank {environment.rank}: {sentence}", reason=sentence)
    except KeyboardInterrupt:
        ending.leave(130, INTERRUPTED if environment.local_rank == 0 else "", reason="interrupted")
    except StoppedAtStart:
        sentence = stop_signal.at_start()
        ending.leave(0, sentence if environment.rank == 0 else "", reason=sentence)
    except SystemExit as error:  # of a reader of the output that has left, or of --help
        if dist.is_initialized():
            ending.leave(error.code if isinstance(error.code, int) else 1, reason="nobody reads its output")
        raise
    except Exception as error:
        _leave_after(error, environment, ending)


def _await_speaker(ending: Ending, stop_signal: StopSignal) -> None:
    """Ends this rank when the first one has spoken and torchrun or its word ends the others; returns if it does not.

    torchrun ends all ranks when one is gone, and the first one may still be importing its libraries.
    """
    if stop_signal.release():
        ending.leave(1, tell=False)
    deadline = time.monotonic() + _SPEAKER_PATIENCE
    while time.monotonic() < deadline:
        ending.follow()
        time.sleep(0.1)


def _leave_words(environment: Environment, stop_signal: StopSignal, *, said: bool) -> None:
    """Tells the launcher, which a signal has ended too, that this machine's ranks ended in order, and what to print."""
    if stop_signal.received and environment.farewell_file is not None and environment.local_rank == 0:
        words = "" if said and environment.rank == 0 else stop_signal.farewell or stop_signal.at_start()
        with contextlib.suppress(OSError):
            Path(environment.farewell_file).write_text(words)


def _leave_after(error: Exception, environment: Environment, ending: Ending) -> None:
    """Ends after what is no user's mistake; who only lost the connection to a rank that has ended says which."""
    killed = worker_killed(error)
    if killed is not None:
        ending.leave(1, f"error: rank {environment.rank}: {killed}", reason=killed)
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        deadline = time.monotonic() + _WORD_PATIENCE
        while time.monotonic() < deadline:  # its word may come after its connections have closed
            ending.follow()
            time.sleep(0.1)
        text = re.sub(r"^\[[^]]*\] *|\. This is typically.*", "", str(error).strip().partition("\n")[0])
        sentence = (
            "error: the connection to another rank is lost, which has been killed (by the system if memory ran out, "
            f"for example) or hangs ({text})"
        )
        ending.leave(1, sentence if environment.local_rank == 0 else "", tell=False)
    traceback.print_exc()
    ending.leave(1, reason=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
