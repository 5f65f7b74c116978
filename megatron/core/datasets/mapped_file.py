"""Files mapped into memory without a descriptor each, so that thousands of data sets can be open at once."""

import ctypes
import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray

# Python's own mmap keeps a copy of the descriptor as long as the mapping lives (before 3.13 always).
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBRARY.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | os.PathLike[str], random_access: bool = False) -> NDArray[np.uint8]:
    """The bytes of a file, read-only, from disk when they are used; with `random_access` nothing is read ahead.

    Raises OSError naming the file.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.empty(0, np.uint8)
        address = _LIBRARY.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), os.fspath(path))
    if random_access:
        _LIBRARY.madvise(address, size, mmap.MADV_RANDOM)
    memory = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(memory, _LIBRARY.munmap, address, size).atexit = False
    array = np.frombuffer(memoryview(memory), np.uint8)
    array.flags.writeable = False
    return array
