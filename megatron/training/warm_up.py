"""A pass of one microbatch through every stage of this rank before the first step, without messages between stages.

What runs for the first time loads its kernels, compiles them where they are Triton's, and makes the host wait for the
device meanwhile; in a pipeline, every stage would do that in turn while all others wait.
"""

import itertools
import time
from collections.abc import Iterator

import torch

from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.pipeline_parallel.schedules import Forward
from megatron.core.waiting import waiting
from megatron.training.initialize import print_once
from megatron.training.loader import Batch
from megatron.training.setup import Trainer


def warm_up(trainer: Trainer, source: Iterator[Batch | None]) -> Iterator[Batch | None]:
    """Runs the first microbatch of `source` forward and backward through each chunk; returns the source with it.

    Stages after the first get noise from a generator of their own as hidden states, so that tokens spread over the
    experts as they do in training. Nothing that a step uses is changed: weights are read only, no gradient counts, and
    no reduction begins. Collective over the ranks of a stage; none communicates with another stage or replica.
    """
    start = time.perf_counter()
    first = next(source)
    generator = torch.Generator(trainer.device).manual_seed(0)
    microbatch = Microbatch(
        seed=trainer.arguments.training.seed,
        factors=GradientFactors(dp=trainer.groups.dp.size, cp=trainer.groups.cp.size),
    )
    trainer.buffers.start_step(2)  # with one gradient of two, no bucket is complete, and the next step forgets it
    for number, chunk in enumerate(trainer.model):
        work, hidden = Forward(0, number), None
        if trainer.pipeline.receives(trainer.groups.pp.rank, work):
            hidden = torch.empty(trainer.link.shape, dtype=trainer.link.dtype, device=trainer.device)
            hidden.normal_(generator=generator).requires_grad_()
        output, _ = trainer.forward_step(chunk, first, hidden, microbatch)
        sends = trainer.pipeline.sends(trainer.groups.pp.rank, work)
        output.backward(torch.zeros_like(output) if sends else None)
        del output, hidden
    trainer.buffers.start_step(1)
    if trainer.device.type == "cuda":
        with waiting("the device"):
            torch.cuda.synchronize()
    print_once(trainer.groups, f"kernels loaded in {time.perf_counter() - start:.1f} s")
    return itertools.chain([first], source)
