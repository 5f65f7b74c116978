"""Activations that are computed again in the backward pass instead of kept: which ones, and how.

Full recomputation keeps only the inputs of layers (arXiv:1604.06174); selective recomputation gives up what is large
and cheap to compute again (arXiv:2205.05198, section 5). What is computed again are the same operations on the same
operands, so gradients are equal bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor

Result = TypeVar("Result")

_MODULES = ("core_attn", "moe_act", "layernorm", "moe")
# Modules of Megatron-LM that Mixtral does not have.
_ABSENT = {
    "mlp": "every layer of a Mixtral has experts, which are 'moe'",
    "mla_up_proj": "a Mixtral has no latent attention",
    "shared_experts": "a Mixtral has no shared experts",
}


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activations that are computed again in the backward pass, to save memory; the numbers stay the same."""

    recompute_granularity: Literal["selective", "full"] | None = None
    """Compute parts of each layer again (selective, see --recompute-modules) or whole layers (full); neither if not
    given."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    moe_layer_recompute: bool = False
    """Short for --recompute-granularity selective with moe among the --recompute-modules."""
    recompute_modules: tuple[str, ...] = ()
    """What selective recomputation computes again: core_attn (rotary positions and attention), moe_act (the experts'
    SwiGLU, which always is), layernorm, moe (router, dispatch and experts); core_attn if not given."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: keep the input of every --recompute-num-layers layers (uniform, if not given), or compute only the
    first that many layers of each stage again (block)."""
    recompute_num_layers: int | None = None
    """Layers in a unit (uniform) or layers of a stage (block) that are computed again; 1 if not given."""

    def __post_init__(self) -> None:
        for name in ("recompute_activations", "moe_layer_recompute"):
            if getattr(self, name) and self.recompute_granularity == "full":
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is selective and contradicts --recompute-granularity full: remove one of them"
                )
        for name in self.recompute_modules:
            if name in _ABSENT:
                raise ValueError(f"--recompute-modules {name} is not supported: {_ABSENT[name]}")
            if name not in _MODULES:
                raise ValueError(f"--recompute-modules {name} is unknown: choose from {' '.join(_MODULES)}")
        if self.recompute_modules and not self._selective:
            raise ValueError("--recompute-modules needs --recompute-granularity selective")
        if {"moe", "moe_act"} <= self._covered:
            raise ValueError("--recompute-modules moe (or --moe-layer-recompute) contains moe_act: remove moe_act")
        full = self.recompute_granularity == "full"
        if not full and (self.recompute_method is not None or self.recompute_num_layers is not None):
            raise ValueError("--recompute-method and --recompute-num-layers need --recompute-granularity full")
        if self.recompute_num_layers is not None and self.recompute_num_layers <= 0:
            raise ValueError(f"--recompute-num-layers must be positive, got {self.recompute_num_layers}")

    @property
    def _selective(self) -> bool:
        return self.recompute_activations or self.moe_layer_recompute or self.recompute_granularity == "selective"

    @property
    def _covered(self) -> set[str]:
        """Modules that selective recomputation covers."""
        covered = set(self.recompute_modules)
        if not covered and (self.recompute_activations or self.recompute_granularity == "selective"):
            covered = {"core_attn"}
        return covered | {"moe"} if self.moe_layer_recompute else covered

    def includes(self, module: str) -> bool:
        """Whether selective recomputation covers a module of each layer."""
        assert module in _MODULES, module
        return module in self._covered

    def units(self, layers: int) -> list[tuple[range, bool]]:
        """Consecutive layers of a stage that run as one, and whether they are computed again."""
        if self.recompute_granularity != "full":
            return [(range(layers), False)]
        count = min(self.recompute_num_layers or 1, layers)
        if self.recompute_method == "block":
            units = [(range(layer, layer + 1), True) for layer in range(count)]
            return [*units, (range(count, layers), False)] if count < layers else units
        return [(range(first, min(first + count, layers)), True) for first in range(0, layers, count)]


NO_RECOMPUTE = RecomputeConfig()


def recomputed(function: Callable[..., Result], *args: Any) -> Result:
    """`function(*args)`, of which only the arguments are kept; the backward pass calls it again.

    `function` must do the same every time; collectives in it are repeated.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class _Piece(NamedTuple):
    """A view of the tensor that is not kept."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def _without_keeping(output: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    storage = output.untyped_storage()._cdata  # unlike an address, it tells tensors without values apart, too
    dtype, waiting = output.dtype, 0
    again: Tensor | None = None

    def pack(tensor: Tensor) -> Tensor | _Piece:
        nonlocal waiting
        if tensor.dtype != dtype or tensor.untyped_storage()._cdata != storage:
            return tensor
        waiting += 1
        return _Piece(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(kept: Tensor | _Piece) -> Tensor:
        nonlocal waiting, again
        if not isinstance(kept, _Piece):
            return kept
        if again is None:
            with torch.no_grad():
                again = compute()
        piece = again.as_strided(kept.size, kept.stride, kept.offset)
        waiting -= 1
        if waiting <= 0:
            again = None
        return piece

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def without_keeping(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Any:
    """A context in which operations that use `output`, which is `function(*inputs)`, do not keep it for their backward.

    It is computed again when the first of them needs it, and forgotten after the last. Only `output` itself and its
    views are recognised; it must begin its storage.
    """
    if not torch.is_grad_enabled() or not output.numel():
        return nullcontext()
    assert output.storage_offset() == 0 and output.is_contiguous(), "the output must be laid out as computed again"
    detached = [tensor.detach() for tensor in inputs]
    return _without_keeping(output, lambda: function(*detached))
