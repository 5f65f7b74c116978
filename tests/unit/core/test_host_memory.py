"""Keeping freed memory, in a separate process, since the setting lasts; huge pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.host_memory import zeros

needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages on request"
)

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


def asks_for_huge_pages(address: int, maps: str) -> bool:
    """Whether the mapping with this address has the flag, in the text of /proc/PID/smaps."""
    inside = False
    for line in maps.splitlines():
        first, _, rest = line.partition("-")
        if rest and all(letter in "0123456789abcdef" for letter in first):
            inside = int(first, 16) <= address < int(rest.split()[0], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:x} is in no mapping")


def _flags(program: str) -> list[bool]:
    """Runs it in a separate process; of each tensor in its list `tensors`, whether its middle is to be huge pages."""
    program = f"import torch\nfrom megatron.core.host_memory import keep_freed_memory, zeros\n{program}\n" + (
        "print([tensor[tensor.numel() // 2].data_ptr() for tensor in tensors])\nprint(open('/proc/self/smaps').read())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    addresses, _, maps = result.stdout.partition("\n")
    return [asks_for_huge_pages(int(address), maps) for address in addresses.strip("[]").split(",")]


@needs_huge_pages
def test_what_lasts_lies_in_huge_pages() -> None:
    ours, ordinary = "zeros(2**24, torch.float32, torch.device('cpu'))", "torch.zeros(2**24)"
    assert _flags(f"tensors = [{ours}, {ordinary}]") == [True, False]


@needs_huge_pages
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_the_heap_grows_by_huge_pages() -> None:
    block = "torch.zeros(7 * 2**20)"  # 28 MB: of the heap
    assert _flags(f"assert keep_freed_memory()\ntensors = [{block}]") == [True]


@pytest.mark.parametrize(("size", "dtype"), [(0, torch.float32), (3, torch.float64), (2**22 + 1, torch.bfloat16)])
def test_what_lasts_is_zero(size: int, dtype: torch.dtype) -> None:
    tensor = zeros(size, dtype, torch.device("cpu"))
    assert tensor.shape == (size,) and tensor.dtype == dtype and not tensor.any()
