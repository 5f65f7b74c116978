"""GPUs, memory, limits and the clock of a machine."""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.core.fusions.compiling import compile_failure
from megatron.core.host_memory import available_memory
from tools.doctor_checks.finding import Finding, ok, problem, warning
from tools.gpu_checks.probe import compiler
from tools.run_tool import usable_cores

GIB = 2**30
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED_MEMORY = Path("/dev/shm")
_LEAST_SHARED = 2**30
_LEAST_FILES = 4096
_MOST_TAKEN = 0.05


def check_gpus(processes: int) -> Iterator[Finding]:
    """Those that torch sees, whether they are free and joined, and whether a kernel can be compiled for them."""
    if not torch.cuda.is_available() and not _DRIVER.exists():
        yield ok("GPUs", "none: training runs on the CPU")
        return
    if not torch.cuda.is_available():
        driver = " ".join(_DRIVER.read_text().split("\n")[0].split())
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        remedy = "install a torch with CUDA that this driver can run (pytorch.org), and look at nvidia-smi"
        yield problem("GPUs", f"a driver is there ({driver}), but torch {built} finds none", remedy)
        return
    count = torch.cuda.device_count()
    for number in range(count):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        text = f"{properties.name}, {total / GIB:.1f} GiB, compute capability {properties.major}.{properties.minor}"
        if total - free > _MOST_TAKEN * total + GIB:
            taken = f"{(total - free) / GIB:.1f} GiB are taken by other programs"
            yield warning(f"GPU {number}", f"{text}; {taken}", "end them (nvidia-smi names them), or give fewer GPUs")
        elif properties.major < 8:
            yield warning(f"GPU {number}", text, "it has no bfloat16: train with --fp16, or use an A100 or newer")
        else:
            yield ok(f"GPU {number}", text)
    if processes > count > 1:
        yield problem("GPUs", f"{count} for {processes} processes", f"start --nproc-per-node {count}, or --device cpu")
    apart = [
        (one, other)
        for one in range(count)
        for other in range(one + 1, count)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    if apart:
        text = f"{len(apart)} pairs of GPUs cannot reach each other's memory ({apart[0][0]} and {apart[0][1]} first)"
        remedy = "tensor parallelism over them is slow: see nvidia-smi topo -m, and IOMMU/ACS settings"
        yield warning("GPU links", text, remedy)
    elif count > 1:
        yield ok("GPU links", "every GPU reaches the memory of every other one")
    if reason := compile_failure(torch.device("cuda", 0)):
        remedy = (
            "Triton needs a C compiler, Python.h and a folder to write to (Debian: apt-get install gcc python3-dev)"
        )
        yield problem("compiling", f"no kernel can be compiled here ({reason})", remedy)
    else:
        yield ok("compiling", f"Triton compiles here, with {compiler()}")


def check_limits(gpus: bool) -> Iterator[Finding]:
    """Cores, memory, shared memory and open files."""
    memory = available_memory()
    yield ok(
        "CPU",
        f"{usable_cores()} cores; " + (f"{memory / GIB:.1f} GiB of memory available" if memory else "memory unknown"),
    )
    if _SHARED_MEMORY.is_dir():
        space = os.statvfs(_SHARED_MEMORY)
        free = space.f_bavail * space.f_frsize
        text = f"{free / GIB:.1f} GiB free in {_SHARED_MEMORY}"
        if free < _LEAST_SHARED:
            remedy = "in a container give --shm-size=8g (or --ipc=host), or train with --num-workers 0"
            yield warning("shared memory", f"{text}, through which workers hand over data and NCCL talks", remedy)
        else:
            yield ok("shared memory", text)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    text = "without limit" if hard == resource.RLIM_INFINITY else f"{hard} at most"
    if 0 <= hard < _LEAST_FILES:
        yield warning("open files", text, f"raise the hard limit to {_LEAST_FILES} or more (ulimit -Hn, limits.conf)")
    else:
        yield ok("open files", text)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if gpus and 0 <= locked < GIB:
        text = f"{locked / 2**20:.0f} MiB may be locked, and InfiniBand needs more"
        yield warning(
            "locked memory", text, "in a container give --ulimit memlock=-1, otherwise raise it in limits.conf"
        )


def check_clock() -> Iterator[Finding]:
    """That it is not behind the files of this project, by which programs decide what is newer."""
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    behind = newest - time.time()
    if behind > 60:
        yield warning("clock", f"behind this project's files by {behind:.0f} s", "set it (timedatectl set-ntp true)")
    else:
        yield ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()))
