"""Bytes of tensors that are alive: counted once, freed with the last view, in blocks of torch's allocator."""

import torch

from megatron.training.live_memory import HostWithoutValues, LiveMemory

META = torch.device("meta")
KIB = 1024


def _new(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8, device=META)


def test_storages_are_counted_while_anything_holds_them() -> None:
    with LiveMemory("meta") as memory:
        tensor = _new(8)
        view = tensor[: 4 * KIB].view(4, KIB)
        tensor.add_(1)
        assert memory.live == memory.peak == 8 * KIB
        del tensor
        assert memory.live == 8 * KIB, "the view holds it"
        moved = view.to(torch.int32)
        assert memory.live == memory.peak == (8 + 16) * KIB
        del view
        assert (memory.live, memory.peak) == (16 * KIB, 24 * KIB)
        del moved
    assert memory.live == 0


def test_what_autograd_keeps_is_alive_until_the_backward_pass() -> None:
    with LiveMemory("meta") as memory:
        x = torch.empty(2 * KIB, device=META, requires_grad=True)
        y = x.sin().square()
        assert memory.live == 3 * 8 * KIB, "the sine is kept by nothing else"
        y.sum().backward()
        del y
        assert memory.live == 2 * 8 * KIB, "x and its gradient"


def test_sizes_are_those_of_the_allocator_and_other_devices_are_left_out() -> None:
    with LiveMemory("meta") as memory:
        small = torch.empty(3, device=META)
        host = torch.ones(KIB)
        assert memory.live == 512 and host.sum().item() == KIB
        del small


def test_values_that_are_read() -> None:
    with LiveMemory("meta"):
        number = torch.empty((), dtype=torch.int64, device=META)
        assert (int(number), float(number.double()), bool(number > 0)) == (1, 1.0, True)
        assert number.new_empty(2, 3).cpu().tolist() == [[0, 0, 0], [0, 0, 0]]
        assert torch.ones(3).sum().item() == 3.0, "the host's own numbers are read as they are"


def test_what_stands_for_the_hosts_memory_is_counted_apart() -> None:
    with LiveMemory("meta") as memory:
        host = HostWithoutValues(memory)
        state, buffer = host.zeros(KIB, torch.float32), host.staging(2 * KIB, pinned=True)
        grad = torch.empty(KIB, dtype=torch.bfloat16, device=META)
        assert (memory.host, memory.live) == (6 * KIB, 2 * KIB)
        state[:10].mul_(2)
        staged = buffer.view(torch.bfloat16).copy_(grad)
        wide = staged.float()
        assert (memory.host, memory.live) == (10 * KIB, 2 * KIB), "computed from nothing but the host's"
        back = torch.empty_like(grad).copy_(staged)
        assert (memory.host, memory.live) == (10 * KIB, 4 * KIB)
        del wide, state, back
        assert (memory.host, memory.live, memory.peak) == (2 * KIB, 2 * KIB, 4 * KIB)
        del staged, buffer, grad
    assert memory.host == memory.live == 0
