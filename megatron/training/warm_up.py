"""A microbatch through every stage of this rank before the first step, without messages between stages.

What runs for the first time loads its kernels, compiles them where they are Triton's, and makes the host wait for the
device meanwhile; in a pipeline, every stage would do that in turn while all others wait.
"""

import itertools
import time
from collections.abc import Iterator

import torch
from torch.autograd.graph import get_gradient_edge

from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.pipeline_parallel.schedules import Forward
from megatron.core.waiting import waiting
from megatron.training.initialize import print_once
from megatron.training.loader import Batch
from megatron.training.setup import Trainer


def warms_up(trainer: Trainer) -> bool:
    """Whether ranks would otherwise load their kernels one after another."""
    return trainer.device.type == "cuda" and trainer.pipeline.ranks > 1


def warm_up(
    trainer: Trainer, source: Iterator[Batch | None], *, trains: bool = True, evaluates: bool = False
) -> Iterator[Batch | None]:
    """Runs the first microbatch of `source` through each chunk; returns the source with it.

    If the run `trains`, forward and backward, and if it `evaluates`, forward without gradients, for which libraries
    have kernels of their own. Stages after the first get noise from a generator of their own as hidden states, so that
    tokens spread over the experts as they do in training. Nothing that a step uses is changed: weights are read only,
    no gradient counts, and no reduction begins. Collective over the ranks of a stage; none communicates with another
    stage or replica.
    """
    start = time.perf_counter()
    first = next(source)
    if trains:
        # with two gradients of three, no bucket is complete, and the next step forgets them
        trainer.buffers.start_step(3)
        for _ in range(2):  # the first gradient is written, those after it are added
            _run_chunks(trainer, first)
        trainer.buffers.start_step(1)
    if evaluates:
        trainer.model.eval()
        with torch.no_grad():
            _run_chunks(trainer, first)
        trainer.model.train()
    if trainer.device.type == "cuda":
        with waiting("the device"):
            torch.cuda.synchronize()
    print_once(trainer.groups, f"kernels loaded in {time.perf_counter() - start:.1f} s")
    return itertools.chain([first], source)


def _run_chunks(trainer: Trainer, batch: Batch | None) -> None:
    """A microbatch through each chunk, and back if gradients are enabled."""
    generator = torch.Generator(trainer.device).manual_seed(0)
    microbatch = Microbatch(
        seed=trainer.arguments.training.seed,
        factors=GradientFactors(dp=trainer.groups.dp.size, cp=trainer.groups.cp.size),
    )
    for number, chunk in enumerate(trainer.model):
        work, hidden = Forward(0, number), None
        if trainer.pipeline.receives(trainer.groups.pp.rank, work):
            hidden = torch.empty(trainer.link.shape, dtype=trainer.link.dtype, device=trainer.device)
            hidden.normal_(generator=generator).requires_grad_(torch.is_grad_enabled())
        output, _ = trainer.forward_step(chunk, batch, hidden, microbatch)
        if torch.is_grad_enabled():
            sends = trainer.pipeline.sends(trainer.groups.pp.rank, work)
            torch.autograd.backward(get_gradient_edge(output), torch.zeros_like(output) if sends else None)
