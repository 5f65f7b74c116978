"""The training program: the loop and its evaluations."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import DataConfig, ModelConfig
from megatron.core.datasets.blended_dataset import blend_summary, source_table
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.models.mixtral.flops import training_flops_per_token
from megatron.core.parallel_state import ProcessGroups
from megatron.core.pipeline_parallel.runner import forward_backward
from megatron.core.tokenizers import build_tokenizer
from megatron.training.arguments import parse_arguments
from megatron.training.checkpointing import (
    CheckpointSaver,
    Progress,
    checkpoint_model,
    interchange_layout,
    load_checkpoint,
    locate_checkpoint,
)
from megatron.training.config import Arguments, LoggingConfig, TrainingConfig
from megatron.training.dry_run_report import print_dry_run
from megatron.training.grouped_gemm import settle_grouped_gemm
from megatron.training.initialize import (
    Environment,
    SharedError,
    choose_device,
    on_first,
    print_once,
    run,
    start_distributed,
    start_monitor,
    together,
)
from megatron.training.metrics import MetricsLog, MicrobatchResult, StepRecord, average_over_ranks
from megatron.training.peak import peak_tflops
from megatron.training.setup import (
    Batch,
    DatasetsProvider,
    ForwardStep,
    ModelProvider,
    Trainer,
    batches,
    build_datasets,
    build_pipeline,
    build_schedule,
    build_trainer,
    settle_resumed_schedule,
)
from megatron.training.signals import StopSignal
from megatron.training.warm_up import warm_up


def pretrain(model_provider: ModelProvider, datasets_provider: DatasetsProvider, forward_step: ForwardStep) -> None:
    """Trains as the command line says; bad input ends every rank with status 1 and one sentence."""
    run(lambda environment: _pretrain(environment, model_provider, datasets_provider, forward_step))


def _pretrain(
    environment: Environment,
    model_provider: ModelProvider,
    datasets_provider: DatasetsProvider,
    forward_step: ForwardStep,
) -> None:
    arguments, remarks = parse_arguments(sys.argv[1:], checkpoint_model)
    if arguments.training.dry_run is not None:
        print_dry_run(arguments, remarks, environment.world_size, model_provider, forward_step)
        return
    device = choose_device(arguments.training.device, environment)
    groups = start_distributed(arguments, environment, device)
    _check_save_folder(arguments, groups)
    on_first(lambda: _check_log_files(arguments.logging), groups)
    for remark in remarks:
        print_once(groups, f"note: {remark}")
    stop_signal = StopSignal()
    if arguments.training.exit_signal_handler:
        stop_signal.install()

    tokenizer = together(lambda: build_tokenizer(arguments.tokenizer, arguments.model.vocab_size), groups)
    model = together(lambda: _with_vocabulary(arguments.model, tokenizer.vocab_size), groups)
    together(lambda: build_schedule(arguments, arguments.training.batches(groups.dp.size)), groups)
    together(lambda: build_pipeline(arguments, arguments.training.batches(groups.dp.size)), groups)
    arguments = replace(arguments, model=model)
    together(lambda: datasets_provider(arguments, (0, 0, 0), tokenizer), groups)  # opens the files, builds nothing yet
    source = locate_checkpoint(arguments, groups)
    trainer = build_trainer(arguments, groups, device, model_provider, forward_step, initialize=source is None)
    progress, loaded = load_checkpoint(source, arguments, groups, trainer.model, trainer.optimizer)
    trainer = replace(settle_resumed_schedule(trainer, progress), monitor=start_monitor(arguments, groups))
    datasets = build_datasets(trainer, progress, tokenizer, datasets_provider)
    print_once(groups, f"{_summary(trainer)}\n{_data_tables(trainer.arguments.data, datasets)}{loaded}")
    settle_grouped_gemm(trainer, progress)
    train(trainer, datasets, progress, stop_signal)
    if trainer.monitor is not None:
        trainer.monitor.stop()


def _check_save_folder(arguments: Arguments, groups: ProcessGroups) -> None:
    """Raises ValueError before the first step if checkpoints could not be written, or not by all machines."""
    if arguments.checkpoint.save is None:
        return
    folder = Path(arguments.checkpoint.save)

    def write() -> str:
        if arguments.checkpoint.ckpt_format == "torch":
            interchange_layout(arguments)  # refuses a layout that this format cannot express
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{time.time_ns()}"
        probe.touch()
        return probe.name

    name = on_first(write, groups)

    def see() -> None:
        if not (folder / name).exists():
            raise ValueError(f"--save {folder} is not the same folder on all machines: give one that they share")

    together(see, groups)
    if groups.world.is_first:
        (folder / name).unlink()


def _check_log_files(config: LoggingConfig) -> None:
    """Raises OSError before the first step if what is logged could not be written."""
    if config.metrics_path is not None:
        path = Path(config.metrics_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    if config.tensorboard_dir is not None:
        Path(config.tensorboard_dir).mkdir(parents=True, exist_ok=True)


def _with_vocabulary(model: ModelConfig, tokenizer_size: int) -> ModelConfig:
    if model.vocab_size is None:
        return replace(model, vocab_size=tokenizer_size)
    if tokenizer_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} entries but the model's vocabulary only {model.vocab_size}: use the "
            "tokenizer the model was made with, or a larger --vocab-size"
        )
    return model


def _summary(trainer: Trainer) -> str:
    groups, model = trainer.groups, trainer.arguments.model
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    context = f"context {groups.cp.size} x " if groups.cp.size > 1 else ""
    return (
        f"Mixtral {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts of "
        f"{model.ffn_hidden_size}, top {model.moe_router_topk}, vocabulary {model.vocab_size}, {model.params_dtype}\n"
        f"{groups.world.size} {trainer.device.type} process(es): tensor {groups.tp.size} x pipeline {groups.pp.size} x "
        f"{context}data {groups.dp.size}, sequence parallel {'on' if trainer.model.sequence_parallel else 'off'}; "
        f"{parameters:,} parameters on the first rank; batch {trainer.batch_size} = {groups.dp.size} x "
        f"{trainer.num_microbatches} microbatches of {trainer.arguments.training.micro_batch_size}"
    )


def _data_tables(config: DataConfig, datasets: tuple[Any, Any, Any]) -> str:
    """What the run reads of every source: for training, and for evaluations where they have data of their own."""
    own = bool(config.train_data_path or config.per_split_data_args_path)
    purposes = ("training", "a validation", "the test at the end")
    tables = [
        f"data for {purpose}: {len(dataset):,} samples of {config.seq_length:,} tokens\n{source_table(rows)}\n"
        for purpose, dataset in zip(purposes if own else purposes[:1], datasets, strict=False)
        if (rows := blend_summary(dataset))
    ]
    return "".join(tables)


def _run_microbatches(
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
        run_chunk,
        pipeline=trainer.pipeline,
        rank=trainer.groups.pp.rank,
        num_microbatches=num_microbatches,
        link=trainer.link,
        forward_only=forward_only,
        overlap=not trainer.arguments.parallel.no_overlap_p2p_communication,
    )


def _losses(results: list[MicrobatchResult]) -> torch.Tensor | None:
    """A number that is finite if the losses of this rank's microbatches are."""
    losses = [result.loss for result in results if result.loss is not None]
    return torch.stack(losses).sum() if losses else None


def _set_expert_share(trainer: Trainer, progress: Progress) -> None:
    """Tells routers with `global_aux_loss` how the last step's tokens were shared out."""
    if progress.tokens_per_expert is None:
        return
    counts_LE = torch.tensor(progress.tokens_per_expert, dtype=torch.float64, device=trainer.device)
    for chunk in trainer.model:
        chunk.set_expert_share(counts_LE / counts_LE.sum(dim=1, keepdim=True))


def train_step(
    trainer: Trainer,
    source: Iterator[Batch | None],
    progress: Progress,
    wants_stop: Callable[[], bool] = lambda: False,
) -> tuple[StepRecord, bool]:
    """One iteration: all microbatches, reduction, update. Returns its record and whether any rank wants to stop."""
    start = time.perf_counter()
    if trainer.monitor is not None:
        trainer.monitor.begin(progress.iteration + 1)
    batch_size = trainer.batches.batch_size(progress.consumed_samples)
    num_microbatches = trainer.batches.num_microbatches(progress.consumed_samples)
    trainer.buffers.start_step(num_microbatches)
    _set_expert_share(trainer, progress)
    scale = trainer.optimizer.scaler.scale
    results = _run_microbatches(trainer, source, num_microbatches, progress.consumed_samples, scale)
    trainer.buffers.finalize()
    rates = trainer.schedule.rates(progress.scheduled_samples)
    update = trainer.optimizer.step(rates, _losses(results))
    model = trainer.arguments.model
    busy = trainer.monitor.busy_seconds() if trainer.monitor is not None else 0.0
    averages = average_over_ranks(results, num_microbatches, trainer.groups, model, trainer.device, wants_stop(), busy)
    if trainer.monitor is not None:
        trainer.monitor.end()
    if model.moe_router_load_balancing_type == "global_aux_loss":
        progress.tokens_per_expert = averages.tokens_per_expert
    progress.iteration += 1
    progress.consumed_samples += batch_size
    if update.updated:
        progress.scheduled_samples += batch_size
    else:
        progress.skipped_iterations += 1
    seconds = time.perf_counter() - start
    record = StepRecord(
        iteration=progress.iteration,
        consumed_samples=progress.consumed_samples,
        lm_loss=averages.lm_loss,
        load_balancing_loss=averages.load_balancing_loss,
        z_loss=averages.z_loss,
        tokens_per_expert=averages.tokens_per_expert,
        grad_norm=update.grad_norm,
        loss_scale=update.loss_scale,
        learning_rate=rates.learning_rate,
        global_batch_size=batch_size,
        tokens_per_second=batch_size * trainer.arguments.data.seq_length / seconds,
        skipped=not update.updated,
        blames_scale=update.blames_scale,
        seconds=seconds,
        busy_seconds=averages.busy_seconds,
    )
    return record, averages.stop


def evaluate(trainer: Trainer, dataset: Any) -> float:
    """Mean loss over the first `eval_iters` global batches of a data set; always the same samples."""
    trainer.model.eval()
    model = trainer.arguments.model
    source = batches(trainer, dataset, 0)
    total = 0.0
    for _ in range(trainer.arguments.training.eval_iters):
        results = _run_microbatches(trainer, source, trainer.num_microbatches, forward_only=True)
        averages = average_over_ranks(results, trainer.num_microbatches, trainer.groups, model, trainer.device)
        total += averages.lm_loss
    trainer.model.train()
    return total / trainer.arguments.training.eval_iters


def train(trainer: Trainer, datasets: tuple[Any, Any, Any], progress: Progress, stop_signal: StopSignal) -> None:
    """Runs the loop to the end, or until a flag or a signal stops it; saves on the way and at the end."""
    arguments, training = trainer.arguments, trainer.arguments.training
    train_set, validation_set, test_set = datasets
    last = training.last_iteration(trainer.batches, progress.iteration, progress.consumed_samples)
    log = _open_log(trainer, last, progress.iteration)
    deadline = math.inf
    if training.exit_duration_in_mins is not None:
        deadline = time.monotonic() + 60 * training.exit_duration_in_mins
    if progress.iteration >= last:
        print_once(trainer.groups, f"nothing to train: iteration {progress.iteration} of {last} is already reached")
    if validation_set is None and training.eval_interval and training.eval_iters:
        print_once(trainer.groups, "there are no validation documents, so no evaluation: see --split")
    saver = CheckpointSaver(arguments, trainer.groups) if arguments.checkpoint.save else None
    saved_at = evaluated_at = progress.iteration
    skipped_in_a_row = 0
    source = batches(trainer, train_set, progress.consumed_samples) if progress.iteration < last else iter(())
    if trainer.device.type == "cuda" and trainer.pipeline.ranks > 1 and progress.iteration < last:
        source = warm_up(trainer, source)
    stop = False
    while progress.iteration < last and not stop:
        record, stop = train_step(
            trainer, source, progress, lambda: stop_signal.received or time.monotonic() > deadline
        )
        if log is not None:
            log.step(record)
        if saver is not None:
            saver.poll()
        # steps that look for the right loss scale are no sign of trouble
        skipped_in_a_row = skipped_in_a_row + 1 if record.skipped and not record.blames_scale else 0
        _check_skipped(training, record, skipped_in_a_row, saver)
        iteration = progress.iteration
        interval = arguments.checkpoint.save_interval
        if saver is not None and interval and iteration % interval == 0:
            _save(saver, trainer, progress)
            saved_at = iteration
        # who asked to stop may not wait for an evaluation
        due = training.eval_interval and iteration % training.eval_interval == 0 and not stop
        if validation_set is not None and due:
            _evaluate_and_log(trainer, "validation", validation_set, progress, log)
            evaluated_at = iteration
        stop = stop or bool(training.exit_interval and iteration % training.exit_interval == 0)
    if saver is not None:
        if saved_at != progress.iteration:
            _save(saver, trainer, progress)
        saver.finish()
    if progress.iteration >= last:
        if validation_set is not None and evaluated_at != progress.iteration:
            _evaluate_and_log(trainer, "validation", validation_set, progress, log)
        if test_set is not None:
            _evaluate_and_log(trainer, "test", test_set, progress, log)
    else:
        again = "; the same command continues" if arguments.checkpoint.save else ""
        print_once(trainer.groups, f"stopped at iteration {progress.iteration} of {last}{again}")
    if log is not None:
        log.close()


def _check_skipped(training: TrainingConfig, record: StepRecord, in_a_row: int, saver: CheckpointSaver | None) -> None:
    """Raises SharedError if too many iterations in a row were skipped because they were not finite."""
    if in_a_row >= (1 if training.check_for_nan_in_loss_and_grad else training.max_skipped_iterations):
        if saver is not None:
            saver.finish()
        raise SharedError(
            f"the loss or the gradients of {in_a_row} iteration(s) in a row, up to {record.iteration}, were not finite "
            f"(loss {record.lm_loss}): lower --lr or look at the data; nothing was saved after the last checkpoint"
        )


def _open_log(trainer: Trainer, last: int, resumed_at: int) -> MetricsLog | None:
    """The log on the first rank, None on the others."""
    length = trainer.arguments.data.seq_length
    model, logging = trainer.arguments.model, trainer.arguments.logging
    flops = length * training_flops_per_token(model, length)

    def make() -> MetricsLog | None:
        if not trainer.groups.world.is_first:
            return None
        return MetricsLog(
            logging,
            total_iterations=last,
            flops_per_sample_and_rank=flops / trainer.groups.world.size,
            resumed_at=resumed_at,
            peak_tflops=logging.peak_tflops or peak_tflops(trainer.device, model.dtype),
        )

    return together(make, trainer.groups)


def _save(saver: CheckpointSaver, trainer: Trainer, progress: Progress) -> None:
    trainer.buffers.wait_for_parameters()
    saver.save(trainer.model, trainer.optimizer, progress)


def _evaluate_and_log(trainer: Trainer, split: str, dataset: Any, progress: Progress, log: MetricsLog | None) -> None:
    loss = evaluate(trainer, dataset)
    if log is not None:
        log.evaluation(split, progress.iteration, progress.consumed_samples, loss)
