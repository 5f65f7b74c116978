"""Settings of all tests: one thread a process, since many ranks share the cores; Triton's interpreter without a GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    # read when a kernel is decorated; Triton's own library has kernels too, and other packages import Triton
    os.environ["TRITON_INTERPRET"] = "1"
