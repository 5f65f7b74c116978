"""A training step copies nothing large out of the host's memory, for which it would wait for the device."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.parallel_state import Group
from megatron.core.transformer.moe.token_dispatcher import AllToAllTokenDispatcher


class _Copies(TorchDispatchMode):
    """Elements of every tensor that is copied from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copied = {torch.ops.aten._to_copy.default: args[:1], torch.ops.aten.copy_.default: args[1:2]}.get(func, ())
        for source in copied:
            if source.device.type == "cpu" and isinstance(out, Tensor) and out.device.type != "cpu":
                self.elements.append(source.numel())
        return out


def test_rows_of_experts_are_numbered_on_the_device() -> None:
    dispatcher = AllToAllTokenDispatcher(6, ep=Group((0, 1)), etp=Group(), ep_etp=Group((0, 1)))
    # of the only etp rank, from both ep ranks, for three experts
    arriving = torch.tensor([[[2, 0, 1], [0, 3, 0]]])
    assert dispatcher._experts_of(arriving, torch.device("cpu")).tolist() == [0, 0, 2, 1, 1, 1]
    assert dispatcher._experts_of(0 * arriving, torch.device("cpu")).tolist() == []
    with _Copies() as copies:
        experts = dispatcher._experts_of(1000 * arriving, torch.device("meta"))
    assert experts.shape == (6000,) and copies.elements == [6]
