"""Start-up: the one reader of the environment, the device, torch.distributed, and errors that all ranks share."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron.core.atomic_files import allow_open_files, error_sentence
from megatron.core.host_memory import keep_freed_memory
from megatron.core.parallel_state import ProcessGroups, build_process_groups, connect_control, grid_sizes, network_error
from megatron.core.text_files import terminal_output
from megatron.training.config import Arguments
from megatron.training.loader import worker_killed
from megatron.training.step_monitor import StepMonitor

T = TypeVar("T")


@dataclass(frozen=True)
class Environment:
    """This process's place in the job, as torchrun tells it; a process started without torchrun is alone."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    restarts: int = 0
    """How often torchrun has started the job's processes again (--max-restarts)."""


def read_environment() -> Environment:
    """Reads torchrun's variables."""
    return Environment(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
    )


def choose_device(setting: str, environment: Environment) -> torch.device:
    """The device of this process. Raises ValueError if there are fewer GPUs than processes on this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus < environment.local_world_size:
        raise ValueError(
            f"this machine has {gpus} GPU(s) for {environment.local_world_size} processes: start fewer processes "
            "(torchrun --nproc-per-node, with a smaller tensor- or pipeline-parallel size), or add --device cpu"
        )
    return torch.device("cuda", environment.local_rank)


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
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"restart {environment.restarts}", store),
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


def start_monitor(arguments: Arguments, groups: ProcessGroups) -> StepMonitor | None:
    """Watches the steps of a job of several ranks; names a stuck one before the collectives time out."""
    if groups.world.size == 1:
        return None
    limit = 0.8 * 60 * arguments.training.distributed_timeout_minutes
    store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]

    def report(text: str) -> None:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)

    return StepMonitor(store, groups.world.rank, groups.world.size, limit, report)


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
        dist.all_gather_object(messages, message, group=groups.control.handle)
    failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
    if failed:
        rank, text = failed[0]
        others = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise SharedError(text if len(failed) == len(messages) else f"rank {rank}{others}: {text}")
    return result  # type: ignore[return-value]


def on_first(action: Callable[[], T], groups: ProcessGroups) -> T:
    """Runs `action` on the first rank; every rank returns its result or raises its ValueError or OSError."""
    result = together(lambda: action() if groups.control.is_first else None, groups)
    if groups.control.size > 1:
        shared = [result]
        dist.broadcast_object_list(shared, src=0, group=groups.control.handle)
        result = shared[0]
    return result  # type: ignore[return-value]


def print_once(groups: ProcessGroups, text: str) -> None:
    """Prints on the first rank."""
    if groups.world.is_first:
        print(text, flush=True)


def run(main: Callable[[Environment], None]) -> None:
    """Runs the program; a ValueError ends every rank with status 1 and one sentence.

    The first rank speaks for an error that all share. Before the ranks know of each other, that is the first one of
    each machine; later, an error of one rank alone is reported by that rank.
    """
    environment = read_environment()
    allow_open_files()
    if environment.rank != 0:
        logging.getLogger("megatron").setLevel(logging.ERROR)  # warnings are the same on every rank
    with terminal_output():
        _run(main, environment)
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(main: Callable[[Environment], None], environment: Environment) -> None:
    try:
        main(environment)
    except ValueError as error:
        alone = dist.is_initialized() and not isinstance(error, SharedError)
        speaker = environment.rank == 0 if dist.is_initialized() else environment.local_rank == 0
        if alone or speaker:
            who = f"rank {environment.rank}: " if alone and environment.world_size > 1 else ""
            print(f"error: {who}{error_sentence(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun ends all ranks when one is gone, and the first must have spoken by then
        _leave(1)
    except KeyboardInterrupt:
        if environment.local_rank == 0:
            print("error: interrupted; nothing was saved since the last checkpoint", file=sys.stderr, flush=True)
        _leave(130)
    except SystemExit as error:  # of a reader of the output that has left, or of --help
        if dist.is_initialized():
            _leave(error.code if isinstance(error.code, int) else 1)
        raise
    except Exception as error:
        killed = worker_killed(error)
        if killed is not None:
            print(f"error: rank {environment.rank}: {killed}", file=sys.stderr, flush=True)
            _leave(1)
        traceback.print_exc()
        _leave(1)


def _leave(status: int) -> None:
    """Ends the process at once: other ranks may hang in a collective, and tearing down groups would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
