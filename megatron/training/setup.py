"""Building what a run needs on this rank: data sets, model, optimizer, and the stream of microbatches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.core import collectives
from megatron.core.datasets.blended_dataset import fingerprints
from megatron.core.datasets.sampler import PretrainingSampler
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.host_memory import HostMemory
from megatron.core.microbatch import Microbatch
from megatron.core.models.common import ModelChunks, ModelStage
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.param_scheduler import LearningRateSchedule, resolve_schedule
from megatron.core.parallel_state import ProcessGroups
from megatron.core.pipeline_parallel.p2p_communication import StageLink
from megatron.core.pipeline_parallel.schedules import Pipeline
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.parameter import initialize_parameters, spec_of
from megatron.training.batch_schedule import BatchSchedule
from megatron.training.config import Arguments
from megatron.training.initialize import on_first, together
from megatron.training.loader import Batch, load_batches
from megatron.training.logs.averages import MicrobatchResult
from megatron.training.logs.step_monitor import StepMonitor
from megatron.training.progress import Progress
from megatron.training.run_plan import RunPlan, plan_run


class ModelProvider(Protocol):
    """Builds one stage of the model, uninitialised; without `allocate` its parameters have shapes, but no memory."""

    def __call__(
        self, arguments: Arguments, groups: ProcessGroups, device: torch.device, stage: Stage, allocate: bool
    ) -> ModelStage: ...


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
        self, model: ModelStage, batch: Batch | None, hidden: Tensor | None, microbatch: Microbatch
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
    """The three data sets, indexed by the first rank before the others look.

    Raises ValueError on every rank if they do not all read the same data.
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
    found = fingerprints(datasets[0])
    of_first = on_first(lambda: found, groups)
    together(lambda: _same_everywhere(of_first, found), groups)
    return datasets


def _same_everywhere(of_first: dict[str, str], found: dict[str, str]) -> None:
    """Raises ValueError if this machine has other data than the first rank's, under whatever path."""
    different = [path for (path, ours), theirs in zip(found.items(), of_first.values(), strict=False) if ours != theirs]
    if different or len(found) != len(of_first):
        raise ValueError(
            f"{(different or list(found))[0]} is not the same on all machines: copy the data set there again, with all "
            "its files, or put it where all machines see the same"
        )


def data_fingerprints(dataset: Any, saved: dict[str, str]) -> dict[str, str]:
    """Those of the training set's files. Raises ValueError if one is another than the `saved` one under its name."""
    found = fingerprints(dataset)
    changed = [path for path in saved.keys() & found.keys() if saved[path] != found[path]]
    if changed:
        raise ValueError(
            f"{min(changed)} holds other data than when the checkpoint was saved: bring back the data set that the "
            "run began with, give the new one another name, or start a new run from the weights with --finetune and "
            "another --save folder"
        )
    return found


def build_trainer(
    arguments: Arguments,
    groups: ProcessGroups,
    device: torch.device,
    model_provider: ModelProvider,
    forward_step: ForwardStep,
    initialize: bool = True,
    plan: RunPlan | None = None,
    memory: HostMemory | None = None,
) -> Trainer:
    """Model, gradient buffers, optimizer and pipeline link of this rank, for the `plan` if there is one already.

    The parameters are made in the buffers, so that there is no second copy of them at any time. Without `initialize`
    the weights are zeros, for a checkpoint to be loaded into. The optimizer's state on the host is in `memory`.
    """
    training = arguments.training
    plan = plan or plan_run(arguments, groups.dp.size)
    stages = arguments.parallel.stages(arguments.model.num_layers)[groups.pp.rank]
    model = ModelChunks(model_provider(arguments, groups, device, stage, allocate=False) for stage in stages)
    buffers = GradientBuffers(model, groups, arguments.parallel, arguments.optimizer.main_grads_dtype == "bf16")
    if initialize:
        for chunk in model:
            initialize_parameters(chunk, chunk.first_layer, training.seed)
        _share_initial_weights(model, groups)
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
        optimizer=MixedPrecisionOptimizer(buffers, AdamW(arguments.optimizer), arguments.optimizer, groups, memory),
        schedule=plan.schedule,
        forward_step=forward_step,
        pipeline=plan.pipeline,
        link=link,
        batches=plan.batches,
    )


def resolve_resumed_schedule(trainer: Trainer, saved: dict[str, Any]) -> LearningRateSchedule:
    """The schedule of a run that began with the settings `saved`, if any; raises ValueError if they have changed."""
    config = trainer.arguments.optimizer
    if not saved:
        return trainer.schedule
    return resolve_schedule(
        trainer.schedule,
        saved,
        override=config.override_opt_param_scheduler,
        use_checkpoint=config.use_checkpoint_opt_param_scheduler,
    )


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
