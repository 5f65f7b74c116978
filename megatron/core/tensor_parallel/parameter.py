"""Parameters that know their place in the whole model, and initial values that do not depend on the layout."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.partition import slice_for_rank


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """What a parameter is a part of, and how its gradient is to be treated."""

    global_shape: tuple[int, ...]
    """Shape of the unsplit tensor (of one expert, where experts are stacked), vocabulary padding included."""
    group: Group = field(default_factory=Group)
    """Ranks the tensor is split over."""
    partition_dim: int | None = None
    """Axis it is split along; None for a tensor that every rank holds whole."""
    partition_stride: int = 1
    """Number of blocks along that axis that are each split apart (2 for gate and up)."""
    init_std: float | None = None
    """Standard deviation of its initial values; None for ones."""
    init_rows: int | None = None
    """Rows that are drawn; those after them (vocabulary padding) start as zeros."""
    weight_decay: bool = True
    """Whether AdamW decays it."""
    experts: range | None = None
    """The experts of a layer that are here, stacked in one tensor [experts, ...]; None if it is of no expert."""
    sequence_partial_grad: bool = False
    """Whether each tensor-parallel rank sees only its slice of the sequence, so that gradients must be summed."""

    @property
    def is_expert(self) -> bool:
        """Whether its gradient is averaged over the expert-data-parallel ranks."""
        return self.experts is not None

    @property
    def is_vocabulary(self) -> bool:
        """Whether its rows are entries of the vocabulary: the embedding and the output layer."""
        return self.init_rows is not None


Specs = Mapping[str, ParameterSpec]
"""What a module makes its parameters of, by their names in it."""


def specs_of(module: str, specs: Specs) -> Specs:
    """Those of a submodule, by their names in it."""
    return {name.removeprefix(f"{module}."): spec for name, spec in specs.items() if name.startswith(f"{module}.")}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the parameters of a module are, and who has the rest of them."""

    dtype: torch.dtype
    device: torch.device
    group: Group = field(default_factory=Group)
    """Ranks that its products are split over."""
    sequence_parallel: bool = False
    """Whether each of these ranks has only its slice of the sequence outside of those products."""
    allocate: bool = True
    """Whether parameters get memory; without, they have a shape only, until someone sets their `data`."""

    @property
    def sequence_group(self) -> Group:
        """Ranks that share a sequence outside of the products: of one if each has the whole of it."""
        return self.group if self.sequence_parallel else Group()


def new_parameter(spec: ParameterSpec, placement: Placement) -> nn.Parameter:
    """An uninitialised parameter of this rank's local shape, with `spec` attached, in memory if `placement` says so."""
    shape = list(spec.global_shape)
    if spec.partition_dim is not None:
        assert shape[spec.partition_dim] % (spec.group.size * spec.partition_stride) == 0, spec
        shape[spec.partition_dim] //= spec.group.size
    if spec.experts is not None:
        shape.insert(0, len(spec.experts))
    # one element stands for all of them where there is no memory
    values = torch.empty(shape if placement.allocate else (), dtype=placement.dtype, device=placement.device)
    parameter = nn.Parameter(values.expand(shape))
    parameter.spec = spec  # type: ignore[attr-defined]
    return parameter


def is_allocated(parameter: Tensor) -> bool:
    """Whether a parameter has memory for its values."""
    return parameter.untyped_storage().nbytes() >= parameter.nbytes


def spec_of(parameter: Tensor) -> ParameterSpec:
    """The spec that `new_parameter` attached."""
    spec = getattr(parameter, "spec", None)
    assert isinstance(spec, ParameterSpec), "parameter was not made by new_parameter"
    return spec


@dataclass(frozen=True)
class NamedShard:
    """One rank's part of one tensor of the whole model; experts are unstacked."""

    global_name: str
    """Name with the layer's number in the whole model and the expert's number in the layer."""
    stage_name: str
    """Name with the layer's number in this pipeline stage and the expert's number on this expert-parallel rank, as in
    interchange checkpoints."""
    data: Tensor
    """View of the parameter; writing to it changes the model."""
    spec: ParameterSpec


def named_shards(module: nn.Module, first_layer: int) -> Iterator[NamedShard]:
    """All parameters of a pipeline stage under Megatron-Core's names; `first_layer` is its first global layer."""
    for name, parameter in module.named_parameters():
        spec = spec_of(parameter)
        data = parameter.detach()
        if spec.experts is None:
            yield NamedShard(_global_name(name, first_layer), name, data, spec)
            continue
        for here, number in enumerate(spec.experts):
            local, whole = (name.replace(".experts.", f".experts.local_experts.{n}.") for n in (here, number))
            yield NamedShard(_global_name(whole, first_layer), local, data[here], spec)


def _global_name(stage_name: str, first_layer: int) -> str:
    return re.sub(r"(?<=\.layers\.)\d+", lambda match: str(int(match[0]) + first_layer), stage_name)


def initialize_parameters(module: nn.Module, first_layer: int, seed: int) -> None:
    """Draws every parameter from (seed, its global name) alone, so that each layout starts from the same model.

    Each rank draws the whole tensor in float32 on the CPU and keeps its slice.
    """
    for shard in named_shards(module, first_layer):
        spec = shard.spec
        if spec.init_std is None:
            shard.data.fill_(1)
            continue
        digest = hashlib.sha256(f"{seed}/{shard.global_name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.zeros(spec.global_shape, dtype=torch.float32)
        drawn = whole[: spec.init_rows] if spec.init_rows is not None else whole
        drawn.normal_(std=spec.init_std, generator=generator)
        shard.data.copy_(
            slice_for_rank(whole, spec.partition_dim, spec.partition_stride, spec.group.rank, spec.group.size)
        )
