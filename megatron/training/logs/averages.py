"""The numbers of a step, brought together from all ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.config import ModelConfig
from megatron.core.parallel_state import ProcessGroups
from megatron.core.transformer.moe.router import RouterStatistics
from megatron.core.waiting import to_host


class MicrobatchResult(NamedTuple):
    """What is kept of one microbatch on one stage, without gradient."""

    loss: Tensor | None
    """Mean loss of its tokens; on the last stage only."""
    statistics: RouterStatistics
    """Router statistics of the stage's layers."""
    first_layer: int = 0
    """Number of the stage's first layer in the whole model."""


class StepAverages(NamedTuple):
    """Averages over a whole step, the same on every rank."""

    lm_loss: float
    load_balancing_loss: float
    """Mean over layers and microbatches, without coefficient; 1 when balanced."""
    z_loss: float
    tokens_per_expert: list[list[int]]
    """How often each expert of each layer of the model was chosen, in all microbatches of all ranks."""
    stop: bool
    """Whether any rank wants to stop."""
    busy_seconds: list[float]
    """Time in which each rank was not waiting for others."""


def average_over_ranks(
    results: list[MicrobatchResult],
    num_microbatches: int,
    groups: ProcessGroups,
    model: ModelConfig,
    device: torch.device,
    stop: bool = False,
    busy_seconds: float = 0.0,
) -> StepAverages:
    """Averages over microbatches, data-parallel ranks and layers, in one all-reduce of the whole job.

    `results` are those of all `num_microbatches` microbatches in all of the rank's stages.
    """
    chosen = model.num_layers * model.num_experts
    totals = torch.zeros(4 + chosen + groups.world.size, dtype=torch.float64, device=device)
    chosen_LE = totals[4 : 4 + chosen].view(model.num_layers, model.num_experts)
    if groups.tp.is_first:  # tensor-parallel ranks hold the same numbers
        microbatches = num_microbatches * groups.dp_cp.size
        for result in results:
            if result.loss is not None:
                totals[0] += result.loss.double() / microbatches
            totals[1] += result.statistics.load_balancing_loss.double().sum() / (microbatches * model.num_layers)
            totals[2] += result.statistics.z_loss.double().sum() / (microbatches * model.num_layers)
            counts = result.statistics.tokens_per_expert
            # context-parallel ranks hold the same counts, those of the whole microbatch
            chosen_LE[result.first_layer : result.first_layer + len(counts)] += counts / groups.cp.size
    # arguments of kernels; an assignment would copy from the host, which waits for the device
    totals[3].fill_(float(stop))
    totals[4 + chosen + groups.world.rank].fill_(busy_seconds)
    if groups.world.size > 1:
        collectives.all_reduce(totals, group=groups.world.handle)
    totals = to_host(totals)  # waits for the device once
    loss, balance, z_loss, stops = totals[:4].tolist()
    counts_by_layer = [
        [round(count) for count in counts]
        for counts in totals[4 : 4 + chosen].view(model.num_layers, model.num_experts).tolist()
    ]
    return StepAverages(loss, balance, z_loss, counts_by_layer, stops > 0, totals[4 + chosen :].tolist())
