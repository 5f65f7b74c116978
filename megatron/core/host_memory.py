"""How the process gets memory from the operating system, and how much of it there is."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# names and limits of the C library
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 2**25
# of Linux
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21

_HEAP_AT_ONCE = 2**30
"""Bytes that the heap grows by: addresses alone, memory comes with their use."""


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next request instead of returning it; whether it can.

    Otherwise most activations of a step on the CPU are made of new pages, which the system has to find and to clear.
    Tensors above 32 MB still are. The heap's next gigabyte is made of huge pages where the system has them. glibc alone
    has these settings.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, 2**31 - 1))
    done = all(library.mallopt(name, value) == 1 for name, value in settings)
    if done and library.mallopt(_M_TOP_PAD, _HEAP_AT_ONCE) == 1:
        library.sbrk.restype, library.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
        library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        end = library.sbrk(0)
        library.free(library.malloc(_LARGEST_MMAP_THRESHOLD - 2**12))  # more than is left: the heap grows
        _prefer_huge_pages(end, library.sbrk(0) - end)
    return done


def _prefer_huge_pages(address: int, size: int) -> None:
    """Asks for pages of 2 MB within these bytes, which are best not used yet; without effect where there are none."""
    library = ctypes.CDLL(None)
    first, last = -(-address // _HUGE_PAGE) * _HUGE_PAGE, (address + size) // _HUGE_PAGE * _HUGE_PAGE
    if last > first and hasattr(library, "madvise"):
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)


def zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] for as long as the run lasts; on a CPU in huge pages, so that it misses the TLB less."""
    tensor = torch.empty(size, dtype=dtype, device=device)
    if device.type == "cpu":
        _prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor.zero_()


class HostMemory:
    """What a rank takes of its machine's memory for as long as the run lasts."""

    def claim(self, size: int) -> None:
        """Called once, before `size` bytes are taken. Raises ValueError if the machine has not so many free."""
        free = available_memory()
        if free is not None and size > free:
            raise ValueError(too_much(size, free, 1))

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] that only the host works on. Raises ValueError if there is no such memory."""
        try:
            return zeros(size, dtype, torch.device("cpu"))
        except RuntimeError as error:  # of torch's allocator, whose errors have no class of their own
            raise ValueError(
                f"the system refuses {size * dtype.itemsize / 2**30:.1f} GiB of host memory: lower "
                "--optimizer-offload-fraction, or raise the limit on the memory of a process (ulimit -v)"
            ) from error

    def staging(self, size: int, pinned: bool) -> Tensor:
        """[size] bytes that copies from and to the device pass through. Raises ValueError if they cannot be pinned."""
        if not pinned:
            return self.zeros(size, torch.uint8)
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise ValueError(
                f"the system pins no {size / 2**20:.0f} MiB of host memory ({str(error).splitlines()[0]}): raise the "
                "limit on locked memory (ulimit -l, --ulimit memlock=-1 of a container), or add --no-pin-cpu-grads "
                "and --no-pin-cpu-params, with which copies do not overlap"
            ) from error


def too_much(size: int, free: int, ranks: int) -> str:
    """What to say if the ranks of a machine together want `size` bytes, and `free` bytes are there."""
    who = "this rank" if ranks == 1 else f"the {ranks} ranks of a machine"
    return (
        f"--optimizer-cpu-offload needs {size / 2**30:.1f} GiB of host memory for {who}, of which {free / 2**30:.1f} "
        "GiB are free: lower --optimizer-offload-fraction, share the state out over data-parallel ranks by "
        "--use-distributed-optimizer, or take a machine with more memory"
    )


def available_memory(system: Path = Path("/")) -> int | None:
    """Bytes that processes of this machine, or of this container, can still get; None where the system does not say."""
    return min((*_free_of_machine(system), *_free_of_groups(system)), default=None)


def _free_of_machine(system: Path) -> Iterator[int]:
    for line in _lines(system / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _free_of_groups(system: Path) -> Iterator[int]:
    """What the limits of this process's control groups (version 2) leave; cached files make way."""
    for line in _lines(system / "proc/self/cgroup"):
        if not line.startswith("0::"):
            continue
        group = system / "sys/fs/cgroup" / line.removeprefix("0::").strip("/")
        while group.is_relative_to(system / "sys/fs/cgroup"):
            limit, used = ("".join(_lines(group / f"memory.{name}")) for name in ("max", "current"))
            if limit.isdecimal() and used.isdecimal():
                stat = dict(line.split() for line in _lines(group / "memory.stat"))
                yield max(int(limit) - int(used) + int(stat.get("inactive_file", 0)), 0)
            group = group.parent


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
