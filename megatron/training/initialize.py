"""Start-up: the one reader of the environment, the device, torch.distributed, and errors that all ranks share."""

import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron.core import collectives
from megatron.core.atomic_files import allow_open_files, error_sentence
from megatron.core.fusions.swiglu import swiglu
from megatron.core.host_memory import keep_freed_memory
from megatron.core.parallel_state import ProcessGroups, build_process_groups, connect_control, grid_sizes, network_error
from megatron.core.text_files import terminal_output
from megatron.core.waiting import waiting
from megatron.training.config import Arguments
from megatron.training.ending import Ending
from megatron.training.loader import worker_killed
from megatron.training.logs.step_monitor import StepMonitor
from megatron.training.restarts import agree_on_round
from megatron.training.signals import INTERRUPTED, StoppedAtStart, StopSignal

T = TypeVar("T")
# How long a rank that has lost a connection waits for the word of the one that ended, in seconds.
_WORD_PATIENCE = 2.0


@dataclass(frozen=True)
class Environment:
    """This process's place in the job, as torchrun tells it; a process started without torchrun is alone."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int = 0
    """How often torchrun has started this machine's processes again (--max-restarts)."""
    machines: int = 1
    """Number of torchrun's agents, one a machine."""
    launched: bool = False
    """Whether torchrun started this process."""
    farewell_file: str | None = None
    """Where the first rank of a machine leaves its last words for tools/launch.py."""
    waits_for_saves: bool = True
    """Whether torchrun has been told to wait longer than 30 seconds after it has passed on a signal."""


def read_environment() -> Environment:
    """Reads torchrun's variables."""
    return Environment(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        # some launchers give the first alone
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", int(os.environ.get("LOCAL_RANK", 0)) + 1)),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        machines=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        launched="TORCHELASTIC_RUN_ID" in os.environ,
        farewell_file=os.environ.get("MEGATRON_FAREWELL_FILE"),
        waits_for_saves="TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in os.environ,
    )


def time_to_save(arguments: Arguments, environment: Environment, torch_version: str) -> str | None:
    """A remark if torchrun would kill the ranks 30 seconds after a signal, even while they save."""
    if not (environment.launched and arguments.training.exit_signal_handler and arguments.checkpoint.save):
        return None
    if tuple(map(int, re.findall(r"\d+", torch_version)[:2])) < (2, 12):
        return (
            f"the torchrun of torch {torch_version} kills the ranks 30 s after it has passed on a signal, and a save "
            "that takes longer is lost: install torch 2.12 or newer"
        )
    if environment.waits_for_saves:
        return None
    return (
        "torchrun kills the ranks 30 s after it has passed on a signal, and a save that takes longer is lost: give it "
        "more time with TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900 in its environment"
    )


def choose_device(setting: str, environment: Environment) -> torch.device:
    """The device of this process. Raises ValueError if there are fewer GPUs than processes on this machine.

    A single GPU is taken by every process, since some launchers show each one its own; `start_distributed` checks that.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 1:
        return torch.device("cuda", 0)
    if gpus < environment.local_world_size:
        raise ValueError(_too_few_gpus(gpus, environment))
    return torch.device("cuda", environment.local_rank)


def _too_few_gpus(gpus: int, environment: Environment) -> str:
    return (
        f"this machine has {gpus} GPU(s) for {environment.local_world_size} processes: start fewer processes "
        "(torchrun --nproc-per-node, with a smaller tensor- or pipeline-parallel size), or add --device cpu"
    )


def check_own_gpu(store: dist.Store, environment: Environment, identity: str) -> None:
    """Raises ValueError on every rank of a machine if two of them have the GPU of one `identity`."""
    first = environment.rank - environment.local_rank
    keys = [f"gpu {environment.restarts}.{first + place}" for place in range(environment.local_world_size)]
    store.set(keys[environment.local_rank], identity)
    with waiting():
        identities = {store.get(key) for key in keys}
    if len(identities) < environment.local_world_size:
        raise ValueError(_too_few_gpus(len(identities), environment))


def check_kernels(device: torch.device) -> None:
    """Raises ValueError if a GPU's kernels cannot be compiled here, rather than in the first step."""
    if device.type != "cuda":
        return
    try:
        swiglu(torch.ones(1, 16, device=device), torch.ones(1, device=device))
    except Exception as error:  # a compiler's: any type, often many lines
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"no kernel can be compiled on this machine ({reason}): Triton needs a C compiler (gcc or clang, or CC), "
            "Python's headers (python3-dev) and a folder to write to (TRITON_CACHE_DIR)"
        ) from error


def start_distributed(arguments: Arguments, environment: Environment, device: torch.device) -> ProcessGroups:
    """Joins the job and builds this process's groups. Raises ValueError if the layout does not fit the world size."""
    dense, _ = grid_sizes(arguments.parallel, environment.world_size)
    arguments.training.batches(dense["dp"])
    if arguments.training.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # sums inside the network switches come in any order
        algorithm = os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
        if "NVLS" in algorithm and not algorithm.startswith("^"):
            raise ValueError(
                f"--deterministic-mode does not allow NCCL_ALGO={algorithm}: take NVLS out of it, or unset it"
            )
        torch.use_deterministic_algorithms(True)
        # it would write NaN into every buffer and message before use, and what is read here has been written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(arguments.training.seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # the control group of many ranks cannot connect each to all others. Not on the CPU, where stages exchange their
        # messages over gloo too: a rank would begin its first one only when the other side does
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
        # it is about messages in groups that also have collectives; channels of the pipeline have none
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
    else:
        keep_freed_memory()
    if environment.world_size == 1:
        return ProcessGroups()
    timeout = timedelta(minutes=arguments.training.distributed_timeout_minutes)
    # torchrun keeps one store over all restarts, in which the addresses of the processes that died would be found
    store, _, _ = next(rendezvous("env://", environment.rank, environment.world_size, timeout=timeout))
    if device.type == "cuda" and torch.cuda.device_count() < environment.local_world_size:
        check_own_gpu(store, environment, str(torch.cuda.get_device_properties(device).uuid))
    start = f"restart {environment.restarts}"
    if environment.machines > 1:  # each machine counts its own restarts
        start = agree_on_round(store, environment.rank, environment.world_size, timeout)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(start, store),
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:  # gloo's errors have no class of their own
        if device.type == "cuda" and not isinstance(error, dist.DistError):
            raise
        raise network_error(error) from error
    groups = build_process_groups(arguments.parallel, environment.rank, environment.world_size, timeout)
    connect_control(groups.control)
    return groups


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
        store.clone(),
        groups.world.rank,
        groups.world.size,
        limit,
        report,
        stopping=stop_signal.seconds,
        lost=lambda sentence: ending.leave(1, f"error: {sentence}"),
        look=ending.follow,
    )


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


def largest(values: tuple[float, ...], groups: ProcessGroups) -> list[float]:
    """The largest of each value over all ranks, on every rank; collective."""
    numbers = torch.tensor(values, dtype=torch.float64)
    if groups.control.size > 1:
        collectives.all_reduce(numbers, op=dist.ReduceOp.MAX, group=groups.control.handle)
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
    with terminal_output(keep=False):
        _run(main, environment, Ending(environment.rank), stop_signal)
    stop_signal.uninstall()
    _leave_words(environment, stop_signal)
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
        time.sleep(1)  # torchrun ends all ranks when one is gone, and the first must have spoken by then
        ending.leave(1, tell=False)
    except KeyboardInterrupt:
        ending.leave(130, INTERRUPTED if environment.local_rank == 0 else "", reason="interrupted")
    except StoppedAtStart:
        sentence = stop_signal.at_start()
        _leave_words(environment, stop_signal)
        ending.leave(0, sentence if environment.rank == 0 else "", reason=sentence)
    except SystemExit as error:  # of a reader of the output that has left, or of --help
        if dist.is_initialized():
            ending.leave(error.code if isinstance(error.code, int) else 1, reason="nobody reads its output")
        raise
    except Exception as error:
        _leave_after(error, environment, ending)


def _leave_words(environment: Environment, stop_signal: StopSignal) -> None:
    """Tells the launcher, which a signal has ended too, that this machine's ranks ended in order."""
    if stop_signal.received and environment.farewell_file is not None and environment.local_rank == 0:
        with contextlib.suppress(OSError):
            Path(environment.farewell_file).write_text(stop_signal.farewell or stop_signal.at_start())


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
