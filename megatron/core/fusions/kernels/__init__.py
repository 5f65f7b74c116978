"""The shelf of kernels: `triton` for CUDA devices, `cpu` in C++, `library` for what torch and its libraries bring.

Kernels take and return plain tensors and know nothing of autograd. Each has the name and the arguments of an operation,
whose file says what they are. Unless it is said otherwise operands are contiguous. A part may be missing: whether it is
there is asked here, and which kernel runs is decided in `megatron.core.fusions.forms`.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

DEVICES = {"triton": "cuda", "cpu": "cpu", "library.cuda": "cuda", "library.cpu": "cpu", "library.meta": "meta"}
"""The parts, and where their operands lie. Tests close some, and give Triton's interpreter operands on a CPU."""


class Kernel(NamedTuple):
    """The function with an operation's name in a module of this package."""

    part: str
    module: str
    types: tuple[torch.dtype, ...]
    """What tensors of floating type may be of."""
    words: str = ""
    """What else it asks of the arguments."""
    takes: Callable[..., bool] = lambda *_: True
    """The same as a function of them."""


def in_triton(module: str, *condition: Any) -> Kernel:
    """A Triton kernel; `condition` is words and takes."""
    return Kernel("triton", f"triton.{module}", (torch.float32, torch.bfloat16, torch.float16), *condition)


def in_cpp(*condition: Any) -> Kernel:
    """A kernel in C++."""
    return Kernel("cpu", "cpu.wrapper", (torch.float32, torch.bfloat16), *condition)


def by_library(device: str, *condition: Any, module: str = "") -> Kernel:
    """A library's kernel for a device, in the module of that name or in another one."""
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return Kernel(f"library.{device}", f"library.{module or device}", types, *condition)


def instruction_set() -> str:
    """That of the C++ kernels; empty where they are missing."""
    wrapper = load("cpu.wrapper")
    return "" if isinstance(wrapper, str) or "cpu" not in DEVICES else wrapper.instruction_set()


@functools.cache
def load(module: str) -> ModuleType | str:
    """A module of this package, or why there is none."""
    try:
        loaded = importlib.import_module(f"{__name__}.{module}")
    except ModuleNotFoundError as error:
        return f"there is no module {error.name}"
    return getattr(loaded, "MISSING", "") or loaded


def refusal(kernel: Kernel, arguments: tuple[Any, ...]) -> str:
    """Why a kernel does not run with these arguments of its operation; empty if it does."""
    device = DEVICES.get(kernel.part)
    if device is None:
        return "closed"
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if any(tensor.device.type != device for tensor in tensors):
        return f"for tensors on {device}"
    if any(tensor.is_floating_point() and tensor.dtype not in kernel.types for tensor in tensors):
        return "for other types"
    if isinstance(missing := load(kernel.module), str):
        return missing
    return "" if kernel.takes(*arguments) else f"for {kernel.words}"
