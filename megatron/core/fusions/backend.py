"""Which form of an operation runs: the Triton kernels on CUDA, plain PyTorch everywhere else."""

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_triton_on(tensor: Tensor) -> bool:
    """Whether kernels run where `tensor` is."""
    return tensor.is_cuda and _triton_is_installed()


def runs_triton(*tensors: Tensor) -> bool:
    """Whether the kernels take these operands: on a CUDA device, and of floating types up to 32 bits."""
    return all(
        runs_triton_on(tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) for tensor in tensors
    )
