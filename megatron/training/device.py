"""The device of a process, and what libraries have to know before they use it."""

import torch
import torch.distributed as dist

from megatron.core.fusions.compiling import compile_failure
from megatron.core.host_memory import keep_freed_memory
from megatron.training.config import TrainingConfig
from megatron.training.environment import Environment, set_communication_of_gpus, set_deterministic_libraries


def choose_device(setting: str, environment: Environment) -> torch.device:
    """The device of this process. Raises ValueError if there are fewer GPUs than processes on this machine.

    A single GPU is taken by every process, since some launchers show each one its own; `start_distributed` checks that.
    """
    if setting == "cpu":  # CUDA is not even asked
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto" and gpus == 0:
        return torch.device("cpu")
    if gpus == 1:
        return torch.device("cuda", 0)
    if gpus < environment.local_world_size:
        raise ValueError(
            f"this machine has {gpus} GPU(s) for {environment.local_world_size} processes: start fewer processes "
            "(torchrun --nproc-per-node, with a smaller tensor- or pipeline-parallel size), or add --device cpu"
        )
    return torch.device("cuda", environment.local_rank)


def claim_gpu(store: dist.Store, rank: int, identity: str) -> None:
    """Raises ValueError if another rank, of whatever machine, has claimed the GPU of this `identity` before."""
    owner = int(store.compare_set(f"gpu/{identity}", "", str(rank)))
    if owner != rank:
        raise ValueError(
            f"ranks {owner} and {rank} have the same GPU ({identity}): start at most one process for each GPU "
            "(torchrun --nproc-per-node; under other launchers LOCAL_RANK or CUDA_VISIBLE_DEVICES must tell each "
            "process its own), or add --device cpu"
        )


def check_kernels(device: torch.device) -> None:
    """Raises ValueError if a GPU's kernels cannot be compiled here, rather than in the first step."""
    if device.type != "cuda":
        return
    if reason := compile_failure(device):
        raise ValueError(
            f"no kernel can be compiled on this machine ({reason}): Triton needs a C compiler (gcc or clang, or CC), "
            "Python's headers (python3-dev) and a folder to write to (TRITON_CACHE_DIR)"
        )


def take_device(training: TrainingConfig, environment: Environment, store: dist.Store | None) -> torch.device:
    """Chooses this process's device and sets the libraries up for it. Raises ValueError if there is none for it."""
    device = choose_device(training.device, environment)
    if training.deterministic_mode:
        set_deterministic_libraries()
        torch.use_deterministic_algorithms(True)
        # it would write NaN into every buffer and message before use, and what is read here has been written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        keep_freed_memory()
        return device
    torch.cuda.set_device(device)
    if store is not None:
        claim_gpu(store, environment.rank, str(torch.cuda.get_device_properties(device).uuid))
    set_communication_of_gpus()
    return device
