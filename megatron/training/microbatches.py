"""A step's microbatches through the stages of this rank."""

from collections.abc import Iterator

import torch

from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.pipeline_parallel.runner import forward_backward
from megatron.training.logs.averages import MicrobatchResult
from megatron.training.setup import Batch, Trainer


def run_microbatches(
    trainer: Trainer,
    source: Iterator[Batch | None],
    num_microbatches: int,
    first_sample: int = 0,
    loss_scale: float = 1.0,
    forward_only: bool = False,
) -> list[MicrobatchResult]:
    """Runs a step's microbatches through this rank's stages; returns a result for each of them in each stage.

    `first_sample` is the number of the first of the step's samples, of all ranks.
    """
    chunks, dp, training = list(trainer.model), trainer.groups.dp, trainer.arguments.training
    factors = GradientFactors(
        loss_scale=loss_scale, num_microbatches=num_microbatches, dp=dp.size, cp=trainer.groups.cp.size
    )
    held: dict[int, Batch | None] = {}

    def run_chunk(number: int, chunk: int, hidden: torch.Tensor | None) -> tuple[torch.Tensor, MicrobatchResult]:
        if chunk == 0:
            held[number] = next(source)
        batch = held[number]
        if chunk == len(chunks) - 1:
            del held[number]
        sample = first_sample + (number * dp.size + dp.rank) * training.micro_batch_size
        microbatch = Microbatch(seed=training.seed, first_sample=sample, factors=factors)
        return trainer.forward_step(chunks[chunk], batch, hidden, microbatch)

    return forward_backward(
        run_chunk, pipeline=trainer.pipeline, rank=trainer.groups.pp.rank, num_microbatches=num_microbatches,
        link=trainer.link, forward_only=forward_only,
        overlap=not trainer.arguments.parallel.no_overlap_p2p_communication,
    )  # fmt: skip


def sum_of_losses(results: list[MicrobatchResult]) -> torch.Tensor | None:
    """A number that is finite if the losses of this rank's microbatches are; None on a rank without losses."""
    losses = [result.loss for result in results if result.loss is not None]
    return torch.stack(losses).sum() if losses else None
