"""The layers of one pipeline stage."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron.core.config import ModelConfig
from megatron.core.context_parallel.zigzag import positions
from megatron.core.fusions.rotary import rotary_tables
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import ProcessGroups
from megatron.core.recompute import RecomputeConfig, recomputed
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.parameter import Placement, Specs, specs_of
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.core.transformer.norm import RMSNorm
from megatron.core.transformer.transformer_layer import TransformerLayer


class TransformerBlock(nn.Module):
    """The layers of a stage, in order; the last stage also applies the final norm."""

    def __init__(
        self,
        config: ModelConfig,
        stage: Stage,
        specs: Specs,
        groups: ProcessGroups,
        placement: Placement,
        recompute: RecomputeConfig,
    ) -> None:
        super().__init__()
        self.config, self.cp = config, groups.cp
        self.sequence_shards = placement.sequence_group.size
        of_layer = specs_of("layers.{layer}", specs)
        self.layers = nn.ModuleList(
            TransformerLayer(config, number, of_layer, groups, placement, recompute) for number in stage.layers
        )
        self.units = recompute.units(len(self.layers))
        self.final_layernorm = None
        if stage.has_output:
            self.final_layernorm = RMSNorm(specs["final_layernorm.weight"], config.norm_epsilon, placement)

    def forward(self, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, RouterStatistics]:
        """Returns the residual stream after the stage's layers, and their router statistics stacked [layers, ...].

        x: [S/cp, B, H] (or [S/cp/tp, B, H]); layers get the microbatch with its places and rotary tables.
        """
        config = self.config
        places = positions(x.shape[0] * self.sequence_shards, self.cp, x.device)
        position_ids = places if microbatch.position_ids is None else microbatch.position_ids
        rotary = rotary_tables(position_ids, config.head_dim, config.rotary_base, x.dtype)
        microbatch = replace(microbatch, places=places, rotary=rotary)
        statistics: list[RouterStatistics] = []
        for layers, again in self.units:
            arguments = (layers, x, microbatch)
            x, unit_statistics = recomputed(self._run, *arguments) if again else self._run(*arguments)
            statistics += unit_statistics
        if self.final_layernorm is not None:
            x = self.final_layernorm(x)
        return x, RouterStatistics(*(torch.stack(values) for values in zip(*statistics, strict=True)))

    def _run(self, layers: range, x: Tensor, microbatch: Microbatch) -> tuple[Tensor, list[RouterStatistics]]:
        statistics = []
        for number in layers:
            x, layer_statistics = self.layers[number](x, microbatch)
            statistics.append(layer_statistics)
        return x, statistics
