"""A CUDA device that is not there: real code runs on tensors that only claim to lie on it, and what it does is watched.

Tensors of the device are torch's fake tensors, which know shape, type and place but hold no values; the host's tensors
are real. Triton's kernels are not run, their launches are checked. So all of a training step happens but the numbers,
streams and messages: device mix-ups, launches no device takes, waits of the host, and the memory of the step show.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime import _allocation
from triton.runtime.jit import JITFunction

from megatron.core import collectives, waiting
from megatron.core.fusions.kernels.library import cuda
from megatron.core.fusions.kernels.triton import persistent_gradient
from megatron.training import live_memory
from megatron.training.live_memory import LiveMemory, is_host

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
_ALIGNMENT = 16
"""Bytes that a kernel's pointers are multiples of."""
_MULTIPROCESSORS = 132
_MAX_GRID = (2**31 - 1, 65535, 65535)
_WATCHERS = {live_memory.__file__, collectives.__file__, waiting.__file__, __file__}

SNAPSHOT = "core/dist_checkpointing/writer.py:snapshot"
"""The copies of --async-save, which a step waits for."""


class Wait(NamedTuple):
    """The host waits until the device has done everything before."""

    kind: str
    place: str
    """File and function."""


def place() -> str:
    """The innermost function of the project that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if str(path) not in _WATCHERS and path.is_relative_to(ROOT / "megatron"):
            return f"{path.relative_to(ROOT).as_posix().removeprefix('megatron/')}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class PretendedGPU(LiveMemory):
    """While it is active, the device exists, and what is done on it is checked and counted.

    AssertionError names the place where tensors of host and device are mixed, where a message is no contiguous tensor
    of the device, where a launch is not one that a device takes, and where a shape would depend on values.

    Attributes:
        waits: how often the host waited, by kind and place.
        unmarked: those of them that the monitor of a run would take for work.
        collectives: how often each was begun.
        launches: how often each of Triton's kernels was launched.
        copies: bytes of copies between host and device that the host does not wait for, by direction.
    """

    def __init__(self) -> None:
        super().__init__(DEVICE.type)
        self.waits: Counter[Wait] = Counter()
        self.unmarked: Counter[Wait] = Counter()
        self.collectives: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.stream = self.default_stream = Stream(self)
        self._pinned: dict[int, Any] = {}

    def start(self) -> None:
        """Resets the counts."""
        self.peak = self.live
        for counter in (self.waits, self.unmarked, self.collectives, self.launches, self.copies):
            counter.clear()

    def wait(self, kind: str) -> None:
        """Notes that the host waits here."""
        wait = Wait(kind, place())
        self.waits[wait] += 1
        if threading.get_ident() not in waiting.waits():
            self.unmarked[wait] += 1

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carries an operation out: the host's own for real, the device's on fake tensors."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        if func.namespace == "c10d":
            self._check_message(func, tensors)
        if not any(map(self.holds, tensors)) and (target is None or is_host(target)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self._watch(func, args, kwargs, tensors)
        if func is torch.ops.aten._local_scalar_dense.default or (
            func is torch.ops.aten._to_copy.default and is_host(target)
        ):
            with unset_fake_temporarily():
                return super().run(func, args, kwargs)
        if func is torch.ops.aten.copy_.default and not self.holds(args[0]):
            with unset_fake_temporarily():
                return args[0].zero_()
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            self.wait("fallback of grouped_mm")  # torch knows no shape of it; it loops over the experts on the host
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"{place()}: what {func} returns depends on values of the device") from error

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return mode.from_tensor(tensor)

    def _check_message(self, func: Any, tensors: list[Tensor]) -> None:
        self.collectives[func.overloadpacket.__name__] += 1
        for tensor in tensors:
            assert self.holds(tensor), f"{place()}: {func} of a tensor on {tensor.device}"
            assert tensor.is_contiguous(), f"{place()}: {func} of strides {tensor.stride()}"

    def _watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            self.wait("number read")
        elif func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            target = (
                args[0].device if func is aten.copy_.default else torch.device(kwargs.get("device") or source.device)
            )
            if target.type != source.device.type:
                direction = "copy to the host" if self.holds(source) else "copy to the device"
                if func is aten.copy_.default and self._is_asynchronous(*args, **kwargs):
                    self.copies[direction] += source.nbytes
                else:
                    # without pinned memory, copies to the device are no more asynchronous than those to the host
                    self.wait(direction)
        else:
            mixed = [tensor for tensor in tensors if tensor.dim() and not self.holds(tensor)]
            assert not mixed, f"{place()}: {func} of tensors on host and device"

    def _is_asynchronous(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> bool:
        """Whether the host goes on: between types it would convert in memory that is not pinned."""
        host = source if self.holds(target) else target
        pinned = host.untyped_storage().data_ptr() in self._pinned
        apart = self.stream is not self.default_stream or place() == SNAPSHOT
        assert not pinned or apart, f"{place()}: a copy that holds up the device"
        return non_blocking and pinned and target.dtype == source.dtype

    def pin(self, tensor: Tensor) -> Tensor:
        """Marks memory of the host as pinned, and keeps it, so that no other tensor comes to lie there."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = storage
        return tensor

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        """Checks a launch of a Triton kernel."""
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        where = f"{place()}: {name}"
        values = {**dict(zip(kernel.arg_names, args)), **kwargs}
        for parameter in kernel.params:
            value = values[parameter.name]
            if isinstance(value, Tensor):
                assert self.holds(value), f"{where}: {parameter.name} is on {value.device}"
                offset = value.storage_offset() * value.element_size()
                assert offset % _ALIGNMENT == 0, f"{where}: {parameter.name} is not aligned to {_ALIGNMENT} bytes"
            else:
                assert isinstance(value, (bool, int, float)), f"{where}: {parameter.name} is {value!r}"
                assert isinstance(value, float) or abs(value) < 2**63, f"{where}: {parameter.name} is {value}"
        if "make_tensor_descriptor" in "".join(kernel.raw_src):
            # as set in this thread: autograd's own begin without, and nobody may count on an earlier launch
            allocated = _allocation._allocator.get()(128, 64, None)
            assert self.holds(allocated), f"{where}: descriptors on {allocated.device}"
            triton.set_allocator(_allocation.NullAllocator())
        sizes = grid(values) if callable(grid) else grid
        assert all(0 < size <= most for size, most in zip(sizes, _MAX_GRID)), f"{where}: grid {sizes}"
        self.launches[name] += 1


class Event:
    """A place in a stream."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self._gpu = gpu
        self.recorded = False

    def synchronize(self) -> None:
        """The host waits for it."""
        assert self.recorded, f"{place()}: an event is awaited that was not recorded"
        self._gpu.wait("event")


class Stream:
    """A stream, whose work is not done: that its order is kept is tested elsewhere."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self._gpu = gpu

    def wait_stream(self, stream: "Stream") -> None:
        """A stream waits for another one, not the host."""
        assert stream is not self, f"{place()}: a stream waits for itself"

    def synchronize(self) -> None:
        """The host waits for all that the stream has to do."""
        self._gpu.wait("synchronize")

    def wait_event(self, event: Event) -> None:
        """As `wait_stream`."""
        assert event.recorded, f"{place()}: an event is awaited that was not recorded"

    def record_event(self, event: Event) -> Event:
        """Puts an event after what the stream has to do."""
        event.recorded = True
        return event


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What torch chooses on a GPU; a build for CPUs would take the formula, which keeps the whole S x S matrix."""
    assert attn_mask is None, "only whole samples and causal attention are expected"
    aten = torch.ops.aten
    if query.dtype == torch.float32:
        assert not enable_gqa, "no kernel for float32 takes grouped heads"
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]


_tensor, _empty = torch.tensor, torch.empty


def _made_and_moved(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor` in two steps, since threads of autograd make it on the device without asking the mode."""
    return _tensor(data, **options).to(device or "cpu")


class _HostGenerator(torch.Generator):
    """Any device's: a torch without CUDA has none for a GPU."""

    def __new__(cls, device: Any = "cpu") -> "_HostGenerator":
        return super().__new__(cls)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Lets the device exist; the helper of `device_guard` has to be loaded."""
    gpu = PretendedGPU()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        gpu.launch(kernel, *args, **kwargs)

    def synchronize(*_: object) -> None:
        gpu.wait("synchronize")

    def empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return gpu.pin(_empty(*size, **options)) if pin_memory else _empty(*size, **options)

    @contextmanager
    def use(stream: Stream) -> Iterator[None]:
        with mock.patch.object(gpu, "stream", stream):
            yield

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (cuda, "_is_hopper_or_blackwell", lambda device: True),
        (persistent_gradient, "_multiprocessors", lambda device: _MULTIPROCESSORS),
        (JITFunction, "run", launch),
        (F, "scaled_dot_product_attention", _fused_attention),
        (torch, "tensor", _made_and_moved),
        (torch, "Generator", _HostGenerator),
        (torch, "empty", empty),
        (torch.cuda, "synchronize", synchronize),
        (torch.cuda, "Stream", lambda device: Stream(gpu)),
        (torch.cuda, "Event", lambda blocking: Event(gpu)),
        (torch.cuda, "stream", use),
        (torch.cuda, "current_stream", lambda device=DEVICE: gpu.stream),
        (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),  # its own reads number by number
    ]
    with ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(FakeTensorMode())
        yield stack.enter_context(gpu)
