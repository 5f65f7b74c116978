"""Where the time of this project's training step goes, from torch.profiler.

Every event's own time, what it does not spend in others, belongs to one group: by the operation itself, the module or
autograd function it runs in, and, for the backward of a plain operation, by where that ran forward.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megatron.core.fusions import forms

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::linear", "mkldnn::",
             "kernel::multiply", "kernel::grouped")  # fmt: skip
_ATTENTION = ("scaled_dot_product", "flash_attention", "kernel::attention")
# where an event runs -> the groups of the products there and of everything else; the innermost that matches counts
_PLACES = {
    "optimizer": ("optimizer", "optimizer"),
    "gradient handling": ("gradient handling", "gradient handling"),
    "AccumulateGrad": ("gradient handling", "gradient handling"),
    "_OutputLoss": ("products of the output layer", "loss"),
    "_ExpertMLP": ("products of the experts", "activation and permutation"),
    "Experts": ("products of the experts", "activation and permutation"),
    "MoELayer": ("products of the experts", "activation and permutation"),
    "TopKRouter": ("norms, rotary, router", "norms, rotary, router"),
    "RMSNorm": ("norms, rotary, router", "norms, rotary, router"),
    "SelfAttention": ("attention projections", "norms, rotary, router"),
}
GROUPS = (
    "products of the experts", "products of the output layer", "attention projections", "attention",
    "activation and permutation", "norms, rotary, router", "loss", "optimizer", "gradient handling", "rest",
)  # fmt: skip


def _place(event: Any, forward_places: dict[int, str]) -> str | None:
    """The innermost entry of _PLACES around the event, or around the operation whose backward it is."""
    while event is not None:
        for place in _PLACES:
            if place in event.name and not event.name.startswith("aten::"):
                return place
        if event.name.startswith("autograd::engine::evaluate_function"):
            return forward_places.get(event.sequence_nr)
        event = event.cpu_parent
    return None


def _group(event: Any, forward_places: dict[int, str]) -> str:
    if any(part in event.name for part in _ATTENTION):
        return "attention"
    parent = event.cpu_parent
    while parent is not None:
        if any(part in parent.name for part in _ATTENTION) and parent.name.startswith("aten::"):
            return "attention"
        parent = parent.cpu_parent
    place = _place(event, forward_places)
    if place is None:
        return "rest"
    return _PLACES[place][0 if event.name.startswith(_PRODUCTS) else 1]


def _named(module: nn.Module) -> None:
    """Lets the forward of a module appear in the profile under the name of its class."""
    forward, name = module.forward, type(module).__name__

    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return forward(*args, **kwargs)

    module.forward = named  # type: ignore[method-assign]


@contextlib.contextmanager
def _named_kernels() -> Iterator[None]:
    """Lets the kernels of all forms appear in the profile as kernel::name of the operation."""
    find = forms.kernel

    def find_named(operation: str, *arguments: Any) -> Callable[..., Any] | None:
        kernel = find(operation, *arguments)

        def named(*arguments: Any) -> Any:
            assert kernel is not None
            with record_function(f"kernel::{operation}"):
                return kernel(*arguments)

        return kernel and named

    with mock.patch.object(forms, "kernel", find_named):
        yield


def profile_groups(model: nn.Module, step: Callable[[], object], steps: int = 3) -> dict[str, float]:
    """Seconds of each of GROUPS in a step on the processor, the mean of `steps`; they add up to the step."""
    for module in model.modules():
        if type(module).__module__.startswith("megatron.") and not isinstance(module, nn.ModuleList):
            _named(module)
    step()
    seconds = dict.fromkeys(GROUPS, 0.0)
    with _named_kernels(), record_function("warm"), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            with record_function("one step"):
                step()
    events = sorted(recorded.events(), key=lambda event: event.time_range.start)
    forward_places: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            place = _place(event, {})
            if place is not None:
                forward_places[event.sequence_nr] = place  # the last one has the node of this number
    for event in events:
        seconds[_group(event, forward_places)] += event.self_cpu_time_total / 1e6 / steps
    return seconds
