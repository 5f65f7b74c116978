"""Settings of all tests: one thread a process, since many ranks share the cores; Triton's interpreter without a GPU.

Tests and the programs that they start find the same signals and umask however they were begun, also from a script in
the background, whose shell has them ignore interrupts.
"""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
os.umask(0o022)  # before the project is imported, which remembers it
signal.signal(signal.SIGINT, signal.default_int_handler)
for _signal in (signal.SIGQUIT, signal.SIGTERM):
    signal.signal(_signal, signal.SIG_DFL)
# processes are killed here, but never the machine: what was written is there, and a busy disk holds up no test
os.fsync = lambda descriptor: None

if not torch.cuda.is_available():
    # read when a kernel is decorated; Triton's own library has kernels too, and other packages import Triton
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU the tests that need one are skipped, also where they are asked for."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What has been imported stays until the end: no garbage collection of a test needs to go through it."""
    gc.collect()
    gc.freeze()
