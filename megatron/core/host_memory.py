"""How the process gets memory from the operating system."""

import ctypes

# names and limits of the C library
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 2**25


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next request instead of returning it; whether it can.

    Otherwise most activations of a step on the CPU are made of new pages, which the system has to find and to clear.
    Tensors above 32 MB still are. glibc alone has these settings.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, 2**31 - 1))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
