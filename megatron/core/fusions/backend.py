"""Which form of an operation runs: Triton kernels on CUDA, C++ on a CPU, plain PyTorch for everything else."""

import functools
import importlib.util

import torch
from torch import Tensor

from megatron.core.fusions.native import kernels as native


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


def runs_native(*tensors: Tensor) -> bool:
    """Whether the C++ form takes these operands: on a CPU, in float32 or bfloat16, where it has been built."""
    return native.kernels_cpp is not None and all(
        tensor.device.type == "cpu" and tensor.dtype in native.TYPES for tensor in tensors
    )
