"""What follows from the flags and the number of replicas alone, checked before anything is built or connected."""

from dataclasses import dataclass

from megatron.core.optimizer.param_scheduler import LearningRateSchedule
from megatron.core.pipeline_parallel.schedules import Pipeline
from megatron.training.batch_schedule import BatchSchedule
from megatron.training.config import Arguments


@dataclass(frozen=True)
class RunPlan:
    """How many samples each step takes, at which rates, and in how many pieces the pipeline takes them."""

    batches: BatchSchedule
    schedule: LearningRateSchedule
    pipeline: Pipeline


def plan_run(arguments: Arguments, data_parallel_size: int) -> RunPlan:
    """The plan for so many replicas. Raises ValueError if batch, schedule and pipeline do not fit together."""
    batches = arguments.training.batches(data_parallel_size)
    return RunPlan(batches, _learning_rate_schedule(arguments, batches), _pipeline(arguments, batches))


def _learning_rate_schedule(arguments: Arguments, batches: BatchSchedule) -> LearningRateSchedule:
    """Learning rate and weight decay by samples. Raises ValueError if warm-up and decay do not fit together."""
    config = arguments.optimizer
    total = arguments.training.total_samples(batches)
    decay = config.lr_decay_samples or batches.samples_after(config.lr_decay_iters or 0) or total
    warmup = config.lr_warmup_samples or batches.samples_after(config.lr_warmup_iters)
    if config.lr_warmup_fraction is not None:
        warmup = int(config.lr_warmup_fraction * decay)
    last_phase = config.lr_wsd_decay_samples or 0
    if config.lr_wsd_decay_iters:
        # the last so many of the iterations up to the end of the decay
        iterations = config.lr_decay_iters or arguments.training.train_iters or 0
        last_phase = decay - batches.samples_after(max(0, iterations - config.lr_wsd_decay_iters))
    return LearningRateSchedule.from_config(
        config, warmup_samples=warmup, decay_samples=decay, wsd_decay_samples=last_phase, weight_decay_samples=total
    )


def _pipeline(arguments: Arguments, batches: BatchSchedule) -> Pipeline:
    """The shape of the pipeline. Raises ValueError if it cannot take the microbatches of some step."""
    ranks = arguments.parallel.stages(arguments.model.num_layers)
    pipeline = Pipeline(len(ranks), len(ranks[0]))
    for batch_size in batches.sizes:
        pipeline.check_microbatches(batch_size // batches.unit)
    return pipeline
