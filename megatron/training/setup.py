"""Building what a run needs on this rank: data sets, model, optimizer, and the stream of microbatches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.datasets.blended_dataset import fingerprints
from megatron.core.datasets.sampler import PretrainingSampler
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.microbatch import Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel, ModelChunks
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.param_scheduler import LearningRateSchedule, settle_schedule
from megatron.core.parallel_state import ProcessGroups
from megatron.core.pipeline_parallel.p2p_communication import StageLink
from megatron.core.pipeline_parallel.schedules import Pipeline
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.parameter import initialize_parameters, spec_of
from megatron.training.batch_schedule import BatchSchedule
from megatron.training.checkpointing import Progress
from megatron.training.config import Arguments
from megatron.training.initialize import together
from megatron.training.loader import Batch, load_batches
from megatron.training.logs.averages import MicrobatchResult
from megatron.training.logs.step_monitor import StepMonitor


class ModelProvider(Protocol):
    """Builds one stage of the model, uninitialised."""

    def __call__(
        self, arguments: Arguments, groups: ProcessGroups, device: torch.device, stage: Stage
    ) -> MixtralModel: ...


class DatasetsProvider(Protocol):
    """Builds the train, validation and test data sets; `num_samples` of each, None where there is nothing."""

    def __call__(
        self, arguments: Arguments, num_samples: tuple[int, int, int], tokenizer: Any
    ) -> tuple[Any, Any, Any]: ...


class ForwardStep(Protocol):
    """Runs one microbatch through a stage; on the last one returns its loss times `microbatch.factors.loss`.

    `hidden` is None on the first stage, `batch` may be None on those between the first and the last.
    """

    def __call__(
        self, model: MixtralModel, batch: Batch | None, hidden: Tensor | None, microbatch: Microbatch
    ) -> tuple[Tensor, MicrobatchResult]: ...


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a step needs on this rank."""

    arguments: Arguments
    groups: ProcessGroups
    device: torch.device
    model: ModelChunks
    buffers: GradientBuffers
    optimizer: MixedPrecisionOptimizer
    schedule: LearningRateSchedule
    forward_step: ForwardStep
    pipeline: Pipeline
    link: StageLink
    batches: BatchSchedule
    monitor: StepMonitor | None = None

    @property
    def batch_size(self) -> int:
        """Samples in a step of an evaluation, and of training when the batch does not grow any more."""
        return self.batches.last

    @property
    def num_microbatches(self) -> int:
        """Microbatches of such a step on each replica."""
        return self.batches.last // self.batches.unit


def build_datasets(
    trainer: Trainer, progress: Progress, tokenizer: Any, provider: DatasetsProvider
) -> tuple[Any, Any, Any]:
    """The three data sets, indexed by the first rank before the others look; their fingerprints go into `progress`.

    Raises ValueError on every rank if a resumed run would train on other data under the same name.
    """
    training, groups = trainer.arguments.training, trainer.groups
    last = training.last_iteration(trainer.batches, progress.iteration, progress.consumed_samples)
    evaluated = training.eval_iters * trainer.batch_size if training.eval_interval or training.skip_train else 0
    needed = trainer.batches.samples_after(last - progress.iteration, progress.consumed_samples)
    num_samples = (0 if training.skip_train else needed, evaluated, evaluated)

    def build(mine: bool) -> tuple[Any, Any, Any] | None:
        return provider(trainer.arguments, num_samples, tokenizer) if mine else None

    first = together(lambda: build(groups.world.is_first), groups)
    others = together(lambda: build(not groups.world.is_first), groups)
    datasets = first or others
    assert datasets is not None
    progress.data_fingerprints = together(
        lambda: _same_data(progress.data_fingerprints, fingerprints(datasets[0])), groups
    )
    return datasets


def _same_data(saved: dict[str, str], found: dict[str, str]) -> dict[str, str]:
    """`found`. Raises ValueError if a file is in both with another fingerprint."""
    changed = [path for path in saved.keys() & found.keys() if saved[path] != found[path]]
    if changed:
        raise ValueError(
            f"{min(changed)} holds other data than when the checkpoint was saved: bring back the data set that the "
            "run began with, give the new one another name, or start a new run from the weights with --finetune and "
            "another --save folder"
        )
    return found


def build_schedule(arguments: Arguments, batches: BatchSchedule) -> LearningRateSchedule:
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
        config,
        warmup_samples=warmup,
        decay_samples=decay,
        wsd_decay_samples=last_phase,
        weight_decay_samples=total,
    )


def build_pipeline(arguments: Arguments, batches: BatchSchedule) -> Pipeline:
    """The shape of the pipeline. Raises ValueError if it cannot take the microbatches of some step."""
    ranks = arguments.parallel.stages(arguments.model.num_layers)
    pipeline = Pipeline(len(ranks), len(ranks[0]))
    for batch_size in batches.sizes:
        pipeline.check_microbatches(batch_size // batches.unit)
    return pipeline


def build_trainer(
    arguments: Arguments,
    groups: ProcessGroups,
    device: torch.device,
    model_provider: ModelProvider,
    forward_step: ForwardStep,
    initialize: bool = True,
) -> Trainer:
    """Model, gradient buffers, optimizer, schedule and pipeline link of this rank.

    Without `initialize` the weights are left as they come, for a checkpoint to be loaded into.
    """
    training = arguments.training
    batches = training.batches(groups.dp.size)
    pipeline = build_pipeline(arguments, batches)
    stages = arguments.parallel.stages(arguments.model.num_layers)[groups.pp.rank]
    model = ModelChunks(model_provider(arguments, groups, device, stage) for stage in stages)
    if initialize:
        for chunk in model:
            initialize_parameters(chunk, chunk.first_layer, training.seed)
        _share_initial_weights(model, groups)
    buffers = GradientBuffers(model, groups, arguments.parallel)
    shards = groups.cp.size * (groups.tp.size if model.sequence_parallel else 1)
    length = arguments.data.seq_length // shards
    link = StageLink(
        channels=groups.pp_channels,
        shape=(length, training.micro_batch_size, arguments.model.hidden_size),
        dtype=arguments.model.dtype,
        device=device,
    )
    return Trainer(
        arguments=arguments,
        groups=groups,
        device=device,
        model=model,
        buffers=buffers,
        optimizer=MixedPrecisionOptimizer(buffers, AdamW(arguments.optimizer), arguments.optimizer, groups),
        schedule=build_schedule(arguments, batches),
        forward_step=forward_step,
        pipeline=pipeline,
        link=link,
        batches=batches,
    )


def settle_resumed_schedule(trainer: Trainer, progress: Progress) -> Trainer:
    """The trainer with the schedule to go on with, which `progress` remembers; raises SharedError if it has changed."""
    schedule, config = trainer.schedule, trainer.arguments.optimizer
    if progress.schedule:
        override, saved = config.override_opt_param_scheduler, config.use_checkpoint_opt_param_scheduler
        schedule = together(
            lambda: settle_schedule(trainer.schedule, progress.schedule, override=override, use_checkpoint=saved),
            trainer.groups,
        )
    progress.schedule = schedule.settings()
    return replace(trainer, schedule=schedule)


def _share_initial_weights(model: ModelChunks, groups: ProcessGroups) -> None:
    """Gives all replicas the first one's weights: processors of another kind may have drawn other last bits."""
    for parameter in model.parameters():
        group = groups.edp if spec_of(parameter).is_expert else groups.dp_cp
        if group.size > 1:
            collectives.broadcast(parameter.detach(), src=group.ranks[0], group=group.handle)


def batches(trainer: Trainer, dataset: Any, consumed_samples: int) -> Iterator[Batch | None]:
    """This rank's microbatches from `consumed_samples` on; None on stages that need nothing of them."""
    data = trainer.arguments.data
    every_stage = data.reset_position_ids or data.reset_attention_mask
    if not (every_stage or trainer.groups.pp.is_first or trainer.groups.pp.is_last):
        while True:
            yield None
    sampler = PretrainingSampler(
        total_samples=len(dataset),
        consumed_samples=consumed_samples,
        micro_batch_size=trainer.arguments.training.micro_batch_size,
        data_parallel_rank=trainer.groups.dp.rank,
        data_parallel_size=trainer.groups.dp.size,
    )
    yield from load_batches(dataset, sampler, data.num_workers, trainer.device)
