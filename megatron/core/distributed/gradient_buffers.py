"""Gradients of all microbatches of a step, accumulated in float32 (or wider) in contiguous buffers."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.tensor_parallel.parameter import spec_of


class _Buffer:
    """One flat tensor; every parameter's `main_grad` is a view of it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device)
        offset = 0
        for parameter in parameters:
            view = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            parameter.main_grad = view  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_accumulate)
            offset += parameter.numel()


def _accumulate(parameter: Tensor) -> None:
    assert parameter.grad is not None
    main_grad(parameter).add_(parameter.grad)
    parameter.grad = None


def main_grad(parameter: Tensor) -> Tensor:
    """The accumulated gradient of a parameter, of its shape, in float32 or wider."""
    return parameter.main_grad  # type: ignore[attr-defined]


class GradientBuffers:
    """Accumulates the gradients of `parameters` and averages them over the ranks that hold the same ones.

    Dense parameters are averaged over dp x cp. Expert parameters are summed over expert-data-parallel ranks only, but
    scaled by the same 1/(dp x cp): between them, the ranks have seen all tokens of the step either way.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], groups: ProcessGroups) -> None:
        self.groups = groups
        self.parameters = list(parameters)
        dense = [p for p in self.parameters if not spec_of(p).is_expert]
        expert = [p for p in self.parameters if spec_of(p).is_expert]
        self._buffers: list[tuple[_Buffer, Group]] = [
            (_Buffer(members), group) for members, group in ((dense, groups.dp_cp), (expert, groups.edp)) if members
        ]
        self._sequence_partial = [main_grad(p) for p in self.parameters if spec_of(p).sequence_partial_grad]

    def zero(self) -> None:
        """Starts a new step."""
        for buffer, _ in self._buffers:
            buffer.flat.zero_()

    def scale(self, factor: float) -> None:
        """Multiplies all gradients."""
        for buffer, _ in self._buffers:
            buffer.flat.mul_(factor)

    def finalize(self) -> None:
        """Makes the gradients those of the whole step; collective over tp, dp x cp and edp."""
        if self._sequence_partial and self.groups.tp.size > 1:
            joined = torch.cat([grad.reshape(-1) for grad in self._sequence_partial])
            dist.all_reduce(joined, group=self.groups.tp.handle)
            sizes = [grad.numel() for grad in self._sequence_partial]
            for grad, total in zip(self._sequence_partial, joined.split(sizes), strict=True):
                grad.copy_(total.view_as(grad))
        replicas = self.groups.dp_cp.size
        for buffer, group in self._buffers:
            if replicas > 1:
                buffer.flat.div_(replicas)
            if group.size > 1:
                dist.all_reduce(buffer.flat, group=group.handle)
