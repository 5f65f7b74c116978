"""Counting the memory of tensors without values, on torch's meta device for example, while real code runs on them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.host_memory import HostMemory

_BLOCK = 512
"""torch's allocator for CUDA devices hands out multiples of so many bytes."""


class LiveMemory(TorchDispatchMode):
    """While it is active: how many bytes of tensors are alive on one kind of device, and how many there were at most.

    Such tensors have no values: a number that is read from them is 1, a copy on the host is zero.

    Attributes:
        live: bytes of storages that were made since it was entered and are not freed yet.
        peak: the largest `live` since it was last set.
        host: bytes of storages that stand for the host's memory, those of `HostWithoutValues`.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.live = self.peak = self.host = 0
        self._sizes: dict[int, int] = {}
        self._on_host: set[int] = set()
        self._makes_for_host = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self.run(func, args, kwargs or {})
        for_host = self._makes_for_host or (bool(self._on_host) and self._works_on_host(args, kwargs))
        for leaf in tree_leaves(result):
            if self.holds(leaf):
                self._count(leaf.untyped_storage(), for_host)
        return result

    def host_tensor(self, size: int, dtype: torch.dtype) -> Tensor:
        """[size] that stands for one in the host's memory, as does what is computed from nothing else."""
        self._makes_for_host = True
        try:
            return torch.empty(size, dtype=dtype, device=self.device_type)
        finally:
            self._makes_for_host = False

    def _works_on_host(self, *arguments: Any) -> bool:
        held = [leaf.untyped_storage()._cdata for leaf in tree_leaves(arguments) if self.holds(leaf)]
        return bool(held) and self._on_host.issuperset(held)

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

    def _count(self, storage: torch.UntypedStorage, for_host: bool) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = -(-storage.nbytes() // _BLOCK) * _BLOCK
        if for_host:
            self._on_host.add(key)
            self.host += size
        else:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._on_host:
            self._on_host.remove(key)
            self.host -= size
        else:
            self.live -= size


class HostWithoutValues(HostMemory):
    """The host's memory of a rank on a device without values: counted apart from the device's, and never too small."""

    def __init__(self, counter: LiveMemory) -> None:
        self._counter = counter

    def claim(self, size: int) -> None:
        """Nothing is taken."""

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """See `HostMemory`."""
        return self._counter.host_tensor(size, dtype)

    def staging(self, size: int, pinned: bool) -> Tensor:
        """See `HostMemory`."""
        return self._counter.host_tensor(size, torch.uint8)


def is_host(device: object) -> bool:
    """Whether a `device` argument of an operation names the host's memory."""
    return device is not None and torch.device(str(device)).type == "cpu"
