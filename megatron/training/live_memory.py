"""Counting the memory of tensors without values, on torch's meta device for example, while real code runs on them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BLOCK = 512
"""torch's allocator for CUDA devices hands out multiples of so many bytes."""


class LiveMemory(TorchDispatchMode):
    """While it is active: how many bytes of tensors are alive on one kind of device, and how many there were at most.

    Such tensors have no values: a number that is read from them is 1, a copy on the host is zero.

    Attributes:
        live: bytes of storages that were made since it was entered and are not freed yet.
        peak: the largest `live` since it was last set.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if self.holds(leaf):
                self._count(leaf.untyped_storage())
        return result

    def holds(self, value: object) -> bool:
        """Whether it is a tensor on the device."""
        return isinstance(value, Tensor) and value.device.type == self.device_type

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carries an operation out."""
        if func is torch.ops.aten._local_scalar_dense.default and self.holds(args[0]):
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and self.holds(args[0]) and is_host(kwargs.get("device")):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def is_host(device: object) -> bool:
    """Whether a `device` argument of an operation names the host's memory."""
    return device is not None and torch.device(str(device)).type == "cpu"
