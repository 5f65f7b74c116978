"""State in the host's memory: the same bits, whenever copies are made that the host or the device does not wait for."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_testing import tiny_arguments
from torch import Tensor

import pretrain_gpt
from megatron.core import host_memory
from megatron.core.distributed.gradient_buffers import ALIGNMENT, GradientBuffers
from megatron.core.host_memory import HostMemory, available_memory
from megatron.core.optimizer import offload, optimizer
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.offload import on_the_host
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.parallel_state import ProcessGroups

STEPS, SKIPPED = 4, 1
PIECE = 3 * ALIGNMENT


class _Mark:
    """A place in the order of a stream."""

    def __init__(self, stream: "_Stream", number: int) -> None:
        self.stream, self.number = stream, number

    def synchronize(self) -> None:
        self.stream.run(self.number)


class _Stream:
    """Does what it is asked for as late as it may, or if it is `eager` as early as what it waits for allows."""

    def __init__(self, eager: bool = False) -> None:
        self.eager = eager
        self.todo: deque[_Mark | Callable[[], object]] = deque()
        self.asked = self.done = 0

    def put(self, action: _Mark | Callable[[], object]) -> _Mark:
        self.todo.append(action)
        self.asked += 1
        while self.eager and self.todo and not self._waits():
            self.run(self.done + 1)
        return _Mark(self, self.asked)

    def _waits(self) -> bool:
        first = self.todo[0]
        return isinstance(first, _Mark) and first.stream.done < first.number

    def run(self, number: int | None = None) -> None:
        while self.done < (self.asked if number is None else number):
            action = self.todo.popleft()
            self.done += 1
            action.synchronize() if isinstance(action, _Mark) else action()


class _Nothing(_Mark):
    """A wait that somebody has forgotten."""

    def synchronize(self) -> None:
        pass


class _Copies:
    """`Copies` of a stream, one of which may have lost a wait."""

    def __init__(self, device: _Stream, eager: bool, lost: str) -> None:
        self.device, self.stream, self.lost = device, _Stream(eager), lost

    def follow(self) -> None:
        if self.lost != "follow":
            self.stream.put(_Mark(self.device, self.device.asked))

    def lead(self) -> None:
        if self.lost != "lead":
            self.device.put(_Mark(self.stream, self.stream.asked))

    def copy(self, target: Tensor, source: Tensor, after: Sequence[Any] = ()) -> _Mark:
        for mark in after if self.lost != "after" else ():
            self.stream.put(_Mark(mark.stream, mark.number))
        mark = self.stream.put(lambda: target.copy_(source))
        return _Nothing(mark.stream, mark.number) if self.lost == "synchronize" else mark


class _Memory(HostMemory):
    """Nothing can be pinned without a GPU; it notes what is asked for."""

    def __init__(self) -> None:
        self.claimed, self.taken = 0, 0
        self.pinned: list[bool] = []

    def claim(self, size: int) -> None:
        self.claimed += size

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        tensor = super().zeros(size, dtype)
        self.taken += tensor.nbytes
        return tensor

    def staging(self, size: int, pinned: bool) -> Tensor:
        self.pinned.append(pinned)
        return self.zeros(size, torch.uint8).fill_(0x7F)  # far from any gradient or weight


def _optimizer(
    dtype: str, memory: HostMemory | None = None, device: str = "cpu", **settings: Any
) -> MixedPrecisionOptimizer:
    """Of a model whose weights are drawn from a seed, in several buckets."""
    generator = torch.Generator().manual_seed(0)
    arguments = tiny_arguments(dtype, settings)
    model = pretrain_gpt.model_provider(arguments, ProcessGroups(), torch.device(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    buffers = GradientBuffers(model, ProcessGroups(), arguments.parallel)
    return MixedPrecisionOptimizer(buffers, AdamW(arguments.optimizer), arguments.optimizer, ProcessGroups(), memory)


def _states(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """Copies of the weights and of the whole state, by parameter."""
    whole = optimizer.state_dict()["parameters"]
    return [
        tensor.clone()
        for parameter, name in optimizer.buffers.names.items()
        for tensor in (parameter.detach(), *(whole[name][key] for key in optimizer.state_names))
    ]


def _train(optimizer: MixedPrecisionOptimizer, device: _Stream) -> list[Tensor]:
    """Steps on random gradients, one of them skipped; the device writes them, and reads the weights, later."""
    generator = torch.Generator().manual_seed(1)
    read: list[list[Tensor]] = []
    for step in range(STEPS):
        for bucket in optimizer.buffers.buckets:
            grads = torch.randn(bucket.grads.shape, generator=generator).to(bucket.grads.dtype)
            for parameter, offset in zip(bucket.parameters, bucket.offsets, strict=True):
                grads[offset + parameter.numel() :][: -parameter.numel() % ALIGNMENT] = 0  # padding
            if step == SKIPPED:
                grads[0] = torch.inf
            bucket.grads.fill_(-1)
            device.put(lambda bucket=bucket, grads=grads: bucket.grads.copy_(grads))  # type: ignore[misc]
        rates = StepRates(learning_rate=0.1 / (1 + step), vocabulary_learning_rate=0.05, weight_decay=0.1)
        assert optimizer.step(rates).updated == (step != SKIPPED)
        device.put(lambda: read.append([p.detach().clone() for p in optimizer.buffers.names]))
        device.run()
    return [tensor for tensors in read for tensor in tensors] + _states(optimizer)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> _Stream:
    """The device's own work; the host waits for it when it reads the norm."""
    device, norm = _Stream(), optimizer.gradient_norm

    def gradient_norm(*arguments: Any) -> float:
        device.run()
        return norm(*arguments)

    monkeypatch.setattr(optimizer, "gradient_norm", gradient_norm)
    monkeypatch.setattr(offload, "PIECE", PIECE)
    return device


OVERLAP = {"num_layers": 1, "overlap_grad_reduce": True, "ddp_bucket_size": 6000}
FEWER_BITS = {"use_precision_aware_optimizer": True, "main_params_dtype": "bf16-remainder", "exp_avg_dtype": "fp8"}
TYPES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {},
    "float64": {},
    "float16": {},
    "bfloat16 gradients": {"grad_reduce_in_bf16": True},
    "bfloat16 in fewer bits": FEWER_BITS | {"exp_avg_sq_dtype": "fp16"},
}


def _all_on_the_device(name: str, device: _Stream) -> list[Tensor]:
    return _train(_optimizer(name.split()[0], None, **OVERLAP, **TYPES[name]), device)


@pytest.mark.parametrize("name", TYPES)
def test_bits_are_those_of_the_device_wherever_the_state_is(name: str, device: _Stream) -> None:
    expected = _all_on_the_device(name, device)
    for fraction in (0.0, 0.5, 1.0):
        share = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
        found = _train(_optimizer(name.split()[0], None, **OVERLAP, **TYPES[name], **share), device)
        assert all(map(torch.equal, found, expected)), fraction


def _staged(
    name: str, fraction: float, eager: bool, device: _Stream, monkeypatch: pytest.MonkeyPatch, lost: tuple[str, str]
) -> list[Tensor]:
    """With copies as for a GPU; `lost` names the waits that are forgotten of those down and of those up."""
    ways = iter(lost)
    monkeypatch.setattr(offload, "new_copies", lambda _: _Copies(device, eager, next(ways)))
    share = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": fraction}
    return _train(_optimizer(name.split()[0], _Memory(), **OVERLAP, **TYPES[name], **share), device)


@pytest.mark.parametrize("eager", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("name", TYPES)
def test_bits_do_not_depend_on_when_copies_are_made(
    name: str, eager: bool, device: _Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _all_on_the_device(name, device)
    for fraction in (0.0, 0.5, 1.0):
        found = _staged(name, fraction, eager, device, monkeypatch, ("", ""))
        assert all(map(torch.equal, found, expected)), fraction


FORGOTTEN = {
    "the host waits for gradients": ("bfloat16", False, ("synchronize", "")),
    "the host waits before it overwrites weights on their way up": ("bfloat16", False, ("", "synchronize")),
    "copies wait for the gradients to be final": ("bfloat16", True, ("follow", "")),
    "the device waits for the weights": ("bfloat16", False, ("", "lead")),
    "masters that come down wait for weights that go up": ("float32", False, ("after", "")),
}


@pytest.mark.parametrize("wait", FORGOTTEN)
def test_a_forgotten_wait_changes_bits(wait: str, device: _Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    name, eager, lost = FORGOTTEN[wait]
    expected = _all_on_the_device(name, device)
    found = _staged(name, 1.0, eager, device, monkeypatch, lost)
    assert not all(map(torch.equal, found, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_gpus_state_on_the_host_has_the_bits_of_a_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without clipping, since a device's norm may have other last bits."""
    monkeypatch.setattr(offload, "PIECE", PIECE)
    settings = {**OVERLAP, "clip_grad": 0.0, "optimizer_cpu_offload": True}
    expected, found = (
        _train(_optimizer(name, None, device, **settings), _Stream(eager=True)) for device in ("cpu", "cuda")
    )
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("dtype", "bytes_an_element"), [("bfloat16", 12), ("float32", 8)])
def test_the_share_is_exact_and_claimed_before_it_is_taken(
    dtype: str, bytes_an_element: int, device: _Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "new_copies", lambda _: offload.ImmediateCopies())
    for fraction in (0.0, 0.3, 1.0):
        memory = _Memory()
        ours = _optimizer(
            dtype, memory, **OVERLAP, optimizer_cpu_offload=True, optimizer_offload_fraction=fraction,
            no_pin_cpu_grads=fraction == 0.3,
        )  # fmt: skip
        elements = sum(bucket.weights.numel() for bucket in ours.buffers.buckets)
        share = elements * fraction * bytes_an_element
        assert share - ALIGNMENT * bytes_an_element < memory.claimed <= share
        staging = 2 * PIECE * (4 + (2 if dtype == "bfloat16" else 4)) if fraction else 0
        assert ours.host_bytes == memory.taken == memory.claimed + staging
        assert memory.pinned == {0.0: [], 0.3: [False, True] * 2, 1.0: [True, True] * 2}[fraction]


def test_the_first_elements_of_the_buckets_are_on_the_host() -> None:
    sizes = [640, 64, 1280]
    assert on_the_host(sizes, 0.0) == [0, 0, 0] and on_the_host(sizes, 1.0) == sizes
    assert on_the_host(sizes, 0.5) == [640, 64, 256]
    assert on_the_host(sizes, 1e-9) == [0, 0, 0] and on_the_host([], 0.5) == []


def test_a_rule_sees_the_parameters_of_a_piece() -> None:
    ours = _optimizer("bfloat16")
    segment = next(segment for segment in ours.segments if len(segment.pieces) > 2)
    start, end = segment.pieces[1].offset - 5, segment.pieces[2].offset + 7
    first, second, third = segment.part(start, end).pieces
    sizes = [piece.end - piece.start for piece in segment.pieces]
    assert (first.start, first.end, first.offset) == (segment.pieces[0].offset + start, sizes[0], 0)
    assert (second.start, second.end, second.offset) == (0, sizes[1], 5)
    assert (third.start, third.end, third.offset) == (0, 7, end - start - 7)
    for piece in segment.part(start, end).pieces:
        part = segment.part(start, end).master.data[piece.offset : piece.offset + piece.end - piece.start]
        assert torch.equal(part, piece.parameter.detach().view(-1)[piece.start : piece.end].float())


def test_what_the_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_memory", lambda: 2**10)
    with pytest.raises(ValueError, match=r"needs 0\.0 GiB of host memory for this rank, of which 0\.0 GiB are free"):
        _optimizer("bfloat16", optimizer_cpu_offload=True)
    with pytest.raises(ValueError, match=r"refuses 1\d+\.\d GiB of host memory: lower --optimizer-offload-fraction"):
        HostMemory().zeros(2**45, torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"pins no 1 MiB of host memory \(.*\): raise the limit .*ulimit -l"):
            HostMemory().staging(2**20, pinned=True)


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_free_memory_is_that_of_the_machine_and_of_its_groups(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    _write(tmp_path, {"proc/meminfo": "MemTotal: 200 kB\nMemAvailable:   100 kB\n"})
    assert available_memory(tmp_path) == 100 * 1024
    group = "sys/fs/cgroup/slice"
    _write(tmp_path, {"proc/self/cgroup": "0::/slice/job\n", f"{group}/job/memory.max": "max\n"})
    assert available_memory(tmp_path) == 100 * 1024
    limits = {"memory.max": "5000\n", "memory.current": "3000\n", "memory.stat": "anon 1\ninactive_file 500\n"}
    _write(tmp_path, {f"{group}/{name}": text for name, text in limits.items()})
    assert available_memory(tmp_path) == 2500
    assert (available_memory() or 1) > 0
