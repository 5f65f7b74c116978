"""How the process gets memory from the operating system."""

import ctypes

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
