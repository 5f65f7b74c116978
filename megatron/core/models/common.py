"""What all models have: specs of their parameters, and stages that a program can train without knowing the model."""

from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn

from megatron.core.models.weight_table import WeightRule, WeightTable
from megatron.core.parallel_state import Group, ProcessGroups
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.parameter import ParameterSpec, Specs
from megatron.core.transformer.moe.router import RouterStatistics, TopKRouter


def parameter_specs(
    rows: Iterable[WeightRule], num_experts: int, groups: ProcessGroups, sequence_parallel: bool
) -> Specs:
    """What a rank makes its parameters of, by their names in a stage with `{layer}` for the number of a layer.

    The experts of a rank are one parameter.
    """
    per_rank = num_experts // groups.ep.size
    experts = range(groups.ep.rank * per_rank, (groups.ep.rank + 1) * per_rank)

    def spec(row: WeightRule) -> ParameterSpec:
        cutters = groups.etp if row.is_expert else groups.tp
        return ParameterSpec(
            global_shape=row.shape,
            group=Group() if row.partition_dim is None else cutters,
            partition_dim=row.partition_dim,
            partition_stride=row.partition_stride,
            init_std=row.init_std,
            init_rows=None if row.padded_rows is None else row.sources[0].shape[0],
            weight_decay=len(row.shape) > 1,
            experts=experts if row.is_expert else None,
            # what all ranks hold whole, each applies to its slice of the sequence
            sequence_partial_grad=sequence_parallel and row.partition_dim is None and not row.is_expert,
        )

    return {row.name.replace(".local_experts.{expert}", ""): spec(row) for row in rows}


class ModelOutput(NamedTuple):
    """What one stage makes of one microbatch."""

    tensor: Tensor
    """Hidden states [S, B, H] (or [S/tp, B, H]) for the next stage; on the last stage the loss of each token [B, S]
    if labels were given, else the logits [B, S, vocabulary]."""
    statistics: RouterStatistics
    """Router statistics of the stage's layers, stacked [layers, ...]."""


class ModelStage(nn.Module):
    """One stage of a model; `forward(x, microbatch)` takes tokens or hidden states and returns `ModelOutput`."""

    kind: ClassVar[str]
    """What the model is called."""

    def __init__(self, stage: Stage, table: WeightTable, groups: ProcessGroups, sequence_parallel: bool) -> None:
        super().__init__()
        self.stage, self.table, self.cp = stage, table, groups.cp
        self.sequence_parallel = sequence_parallel and groups.tp.size > 1

    @property
    def first_layer(self) -> int:
        """Number of the stage's first layer in the whole model."""
        return self.stage.layers.start

    def set_expert_share(self, share_LE: Tensor) -> None:
        """Gives routers the part of all tokens that chose each expert: [layers of the whole model, experts]."""
        for module in self.modules():
            if isinstance(module, TopKRouter):
                module.expert_share = share_LE[module.layer_number]


class ModelChunks(nn.ModuleList):
    """The stages of the model that this rank holds: one, or several with an interleaved pipeline."""

    def __iter__(self) -> Iterator[ModelStage]:
        return cast(Iterator[ModelStage], super().__iter__())

    @property
    def first(self) -> ModelStage:
        """The first of them; what a model says of itself is the same in all."""
        return next(iter(self))

    @property
    def sequence_parallel(self) -> bool:
        """Whether hidden states between its layers are split along the sequence."""
        return self.first.sequence_parallel

    def checkpoint_keys(self) -> list[tuple[str, ModelStage]]:
        """Each stage with Megatron's name for it in a checkpoint: `model`, or `model0`, `model1`, ..."""
        return [("model" if len(self) == 1 else f"model{number}", chunk) for number, chunk in enumerate(self)]
