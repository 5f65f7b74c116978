"""Keeping freed memory; in a process of its own, since the setting lasts."""

import platform
import subprocess
import sys

import pytest

# 20 blocks of 24 MB, freed from the top of the heap downwards: how much of it the process still holds
_PROGRAM = """
import ctypes
from pathlib import Path
from megatron.core.host_memory import keep_freed_memory
assert keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def use():
    blocks = [library.malloc(24 * 2**20) for _ in range(20)]
    for block in blocks:
        ctypes.memset(block, 1, 24 * 2**20)
    for block in reversed(blocks):
        library.free(block)
before = resident()
for _ in range(3):
    use()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_freed_memory_stays_with_the_process() -> None:
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert int(result.stdout) > 19 * 24 * 2**20
