"""The one place that reads and sets variables of the environment: torchrun's, and those of libraries."""

import os
import re
from dataclasses import dataclass

from megatron.training.config import Arguments


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
    """Where the first rank of a machine tells tools/launch.py that all is well, and what it has not printed itself."""
    sets_threads: bool = False
    """Whether somebody has chosen the number of threads (OMP_NUM_THREADS); torchrun sets 1 where nobody has."""
    waits_for_saves: bool = True
    """Whether torchrun waits longer than 30 seconds after it has passed on a signal."""


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
        sets_threads=os.environ.get("OMP_NUM_THREADS", "1") != "1",
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


def set_deterministic_libraries() -> None:
    """Has cuBLAS and NCCL add in a fixed order. Raises ValueError if NCCL_ALGO says otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # sums inside the network switches come in any order
    algorithm = os.environ.setdefault("NCCL_ALGO", "^NVLS,NVLSTree")
    if "NVLS" in algorithm and not algorithm.startswith("^"):
        raise ValueError(f"--deterministic-mode does not allow NCCL_ALGO={algorithm}: take NVLS out of it, or unset it")


def set_communication_of_gpus() -> None:
    """What gloo and NCCL are to do in a job on GPUs."""
    # the control group of many ranks cannot connect each to all others. Not on the CPU, where stages exchange their
    # messages over gloo too: a rank would begin its first one only when the other side does
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    # it is about messages in groups that also have collectives; channels of the pipeline have none
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "0")
