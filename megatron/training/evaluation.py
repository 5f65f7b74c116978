"""The loss on data that is not trained on."""

import time
from typing import Any

from megatron.training.initialize import print_once
from megatron.training.logs.averages import average_over_ranks
from megatron.training.microbatches import run_microbatches
from megatron.training.setup import Trainer, batches
from megatron.training.signals import StopSignal

# Time between two lines on how far an evaluation has come, in seconds.
_PROGRESS_INTERVAL = 10.0


def evaluate(trainer: Trainer, dataset: Any, split: str = "", stop_signal: StopSignal | None = None) -> float | None:
    """Mean loss over the first `eval_iters` global batches of a data set; always the same samples.

    None if any rank is asked to stop by a signal: who asked may not wait for the rest. The first rank says how far a
    long evaluation of a `split` has come.
    """
    stop_signal = stop_signal or StopSignal()
    trainer.model.eval()
    model, iterations = trainer.arguments.model, trainer.arguments.training.eval_iters
    source = batches(trainer, dataset, 0)
    total, stop = 0.0, False
    started = reported = time.monotonic()
    for number in range(1, iterations + 1):
        stop_signal.begin()
        results = run_microbatches(trainer, source, trainer.num_microbatches, forward_only=True)
        averages = average_over_ranks(
            results, trainer.num_microbatches, trainer.groups, model, trainer.device, stop_signal.received
        )
        stop_signal.end()
        total, stop = total + averages.lm_loss, averages.stop
        if stop:
            break
        now = time.monotonic()
        if split and now - reported > _PROGRESS_INTERVAL and number < iterations:
            reported = now
            left = (now - started) / number * (iterations - number)
            print_once(
                trainer.groups,
                f"evaluating on the {split} split: {number} of {iterations} batches, about {left:.0f} s left",
            )
    trainer.model.train()
    return None if stop else total / iterations
