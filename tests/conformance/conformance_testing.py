"""Forms of operations, one at a time, and how their results are compared with float64."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from closeness import BOUNDS, relative_error
from torch import Tensor

from megatron.core.fusions import forms, kernels

HAS_GPU = torch.cuda.is_available()
_WRAPPER = kernels.load("cpu.wrapper")
INSTRUCTION_SETS = [] if isinstance(_WRAPPER, str) else _WRAPPER.kernels_cpp.instruction_sets()
HAS_TRITON = not isinstance(kernels.load("triton.swiglu"), str)

# Each with the types it is tested in. Triton's interpreter computes bfloat16 wrongly without saying so: that is for a
# GPU alone.
FORMS: dict[str, tuple[torch.dtype, ...]] = {
    "formula": (torch.float32, torch.bfloat16),
    "library": (torch.float32, torch.bfloat16),
    **dict.fromkeys(INSTRUCTION_SETS, (torch.float32, torch.bfloat16)),
}
if HAS_TRITON:
    FORMS["triton"] = (torch.float32, torch.float16)
errors: list[tuple[float, float]] = []
"""Relative error and bound of each comparison of the running test; tools/gpu_check.py reports the worst."""
GPU_FORMS = ["library", "triton"] if HAS_TRITON else ["library"]


def form_parameters() -> list[Any]:
    """(form, dtype) of everything that can run on a CPU, and what needs a GPU marked so."""
    made: list[Any] = [
        pytest.param(form, dtype, "cpu", id=f"{form}-{str(dtype).removeprefix('torch.')}")
        for form, dtypes in FORMS.items()
        for dtype in dtypes
        if not (HAS_GPU and form == "triton")
    ]
    for form in GPU_FORMS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            name = f"{form}-{str(dtype).removeprefix('torch.')}-cuda"
            made.append(pytest.param(form, dtype, "cuda", id=name, marks=pytest.mark.gpu))
    return made


def each(*names: str) -> list[object]:
    """These forms as parameters, all if none is named; where there is a GPU, Triton's needs it and is marked so."""
    marks = {"triton": [pytest.mark.gpu]} if HAS_GPU else {}
    return [pytest.param(form, marks=marks.get(form, [])) for form in FORMS if not names or form in names]


def has_descriptors() -> bool:
    """Whether kernels with tensor descriptors run here; Triton's interpreter has them."""
    return not HAS_GPU or torch.cuda.get_device_capability()[0] in (9, 10)


def device_of(form: str) -> str:
    """Where a form's operands lie in tests that run on any machine."""
    return "cuda" if HAS_GPU and form == "triton" else "cpu"


def _add_to_tile(interpreter: Any, kind: Any, tile: Any, value: Any, indices: Any) -> None:
    before = interpreter.create_descriptor_load(tile, indices, None, None)
    interpreter.create_descriptor_store(tile, type(value)(before.data + value.data, value.dtype), indices)


@contextmanager
def interpreted() -> Iterator[None]:
    """What Triton's kernels find where there is no GPU: some multiprocessors, and descriptors that can add."""
    if HAS_GPU or not HAS_TRITON:
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    kernel: Any = kernels.load("triton.persistent_gradient")
    with ExitStack() as stack:
        # fewer than there are tiles, so that a program has several
        stack.enter_context(mock.patch.object(kernel, "_multiprocessors", lambda device: 2))
        if not hasattr(InterpreterBuilder, "create_descriptor_reduce"):
            stack.enter_context(
                mock.patch.object(InterpreterBuilder, "create_descriptor_reduce", _add_to_tile, create=True)
            )
        yield


@contextmanager
def only(form: str) -> Iterator[set[str]]:
    """Lets an operation run in this form or else as its formula; gives the operations whose kernels ran."""
    parts = {"formula": {}, "triton": {"triton": device_of("triton")}}
    parts["library"] = {f"library.{device}": device for device in ("cpu", "cuda", "meta")}
    used: set[str] = set()
    find = forms.kernel

    def find_and_note(operation: str, *arguments: object) -> Callable[..., object] | None:
        kernel = find(operation, *arguments)
        if kernel is not None:
            used.add(operation)
        return kernel

    choose = None
    if form in INSTRUCTION_SETS:
        assert not isinstance(_WRAPPER, str)
        choose = _WRAPPER.kernels_cpp.choose_instruction_set
        choose(form)
    try:
        with (
            mock.patch.dict(kernels.DEVICES, parts.get(form, {"cpu": "cpu"}), clear=True),
            mock.patch.object(forms, "kernel", find_and_note),
            interpreted(),
        ):
            yield used
    finally:
        if choose is not None:
            choose(INSTRUCTION_SETS[0])


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers that `dtype` can hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def assert_close(ours: Tensor, reference: Tensor, bound: float | None = None) -> None:
    """Their relative error is within the bound of ours' type."""
    error, bound = relative_error(ours, reference), bound or BOUNDS[ours.dtype]
    errors.append((error, bound))
    assert error <= bound, error
