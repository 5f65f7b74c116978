"""The training program: the loop and its evaluations."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import ModelConfig
from megatron.core.models.flops import training_flops_per_token
from megatron.core.parallel_state import ProcessGroups, grid_sizes
from megatron.core.tokenizers import build_tokenizer
from megatron.core.waiting import waiting
from megatron.training.arguments import parse_arguments
from megatron.training.checkpoints.folder_lock import FolderLock
from megatron.training.checkpoints.save_folder import check_log_files, open_save_folder
from megatron.training.checkpoints.saver import CheckpointSaver
from megatron.training.checkpoints.source import checkpoint_model, load_checkpoint, locate_checkpoint
from megatron.training.config import Arguments, TrainingConfig
from megatron.training.device import check_kernels
from megatron.training.dry_run_report import print_dry_run
from megatron.training.ending import Ending
from megatron.training.environment import Environment, time_to_save
from megatron.training.evaluation import evaluate
from megatron.training.garbage import GarbageCollection
from megatron.training.grouped_gemm import resolve_grouped_gemm
from megatron.training.initialize import (
    SharedError,
    largest,
    on_first,
    print_once,
    refuse_start,
    run,
    start_distributed,
    start_heartbeat,
    start_monitor,
    together,
)
from megatron.training.logs.averages import average_over_ranks
from megatron.training.logs.metrics import StepRecord
from megatron.training.logs.metrics_log import MetricsLog
from megatron.training.logs.peak import peak_tflops
from megatron.training.logs.step_monitor import StepMonitor
from megatron.training.logs.summary import data_tables, summary
from megatron.training.machine_share import MachineMemory, share_cores
from megatron.training.microbatches import run_microbatches, sum_of_losses
from megatron.training.progress import Progress, RunRecord
from megatron.training.run_plan import RunPlan, plan_run
from megatron.training.setup import (
    Batch,
    DatasetsProvider,
    ForwardStep,
    ModelProvider,
    Trainer,
    batches,
    build_datasets,
    build_trainer,
    data_fingerprints,
    resolve_resumed_schedule,
)
from megatron.training.signals import StopSignal
from megatron.training.warm_up import warm_up, warms_up


def pretrain(model_provider: ModelProvider, datasets_provider: DatasetsProvider, forward_step: ForwardStep) -> None:
    """Trains as the command line says; bad input ends every rank with status 1 and one sentence."""
    providers = (model_provider, datasets_provider, forward_step)
    run(lambda environment, ending, stop_signal: _pretrain(environment, *providers, ending, stop_signal))


def _pretrain(
    environment: Environment,
    model_provider: ModelProvider,
    datasets_provider: DatasetsProvider,
    forward_step: ForwardStep,
    ending: Ending | None = None,
    stop_signal: StopSignal | None = None,
) -> None:
    """`ending` and `stop_signal` are those of the process, for a run that is all it does."""
    try:
        arguments, remarks = parse_arguments(sys.argv[1:], checkpoint_model)
    except (ValueError, OSError) as error:  # the checkpoint may be missing on this machine alone
        refuse_start(environment, error)
        raise
    if arguments.training.dry_run is not None:
        print_dry_run(arguments, remarks, environment.world_size, model_provider, forward_step)
        return
    ending = ending or Ending(environment.rank)
    if stop_signal is not None:
        speaks, leave = environment.local_rank == 0, ending.leave
        stop_signal.install(
            lambda status, sentence: leave(status, sentence if speaks else "", reason=sentence.removeprefix("error: ")),
            saves=arguments.training.exit_signal_handler,
            launched=environment.launched,
        )
    stop_signal = stop_signal or StopSignal()
    dense, _ = grid_sizes(arguments.parallel, environment.world_size)
    plan = plan_run(arguments, dense["dp"])
    device, groups = start_distributed(arguments, environment)
    monitor = start_monitor(arguments, groups, ending, stop_signal)
    heartbeat = start_heartbeat(environment, groups, ending)
    stop_signal.join()
    lock = open_save_folder(arguments, groups, ending)
    try:
        together(lambda: check_kernels(device), groups)
        on_first(lambda: check_log_files(arguments.logging), groups)
        for remark in (*remarks, time_to_save(arguments, environment, torch.__version__)):
            if remark is not None:
                print_once(groups, f"note: {remark}")
        providers = (model_provider, datasets_provider, forward_step)
        memory = MachineMemory(groups, environment, keeps_copies=arguments.checkpoint.async_save)
        if arguments.optimizer.optimizer_cpu_offload and device.type != "cpu":
            share_cores(groups, environment)
        _start_and_train(arguments, plan, groups, device, providers, monitor, stop_signal, lock, memory)
    finally:
        if lock is not None:
            lock.release()
    for watch in (heartbeat, monitor):
        if watch is not None:
            watch.stop()


def _start_and_train(
    arguments: Arguments,
    plan: RunPlan,
    groups: ProcessGroups,
    device: torch.device,
    providers: tuple[ModelProvider, DatasetsProvider, ForwardStep],
    monitor: StepMonitor | None,
    stop_signal: StopSignal,
    lock: FolderLock | None,
    memory: MachineMemory,
) -> None:
    model_provider, datasets_provider, forward_step = providers
    tokenizer = together(lambda: build_tokenizer(arguments.tokenizer, arguments.model.vocab_size), groups)
    model = together(lambda: _with_vocabulary(arguments.model, tokenizer.vocab_size), groups)
    arguments = replace(arguments, model=model)
    together(lambda: datasets_provider(arguments, (0, 0, 0), tokenizer), groups)  # opens the files, builds nothing yet
    source = locate_checkpoint(arguments, groups)
    trainer = build_trainer(arguments, groups, device, model_provider, forward_step, source is None, plan, memory)
    progress, begun, loaded = load_checkpoint(source, trainer)
    schedule = together(lambda: resolve_resumed_schedule(trainer, begun.schedule), groups)
    trainer = replace(trainer, schedule=schedule, monitor=monitor)
    datasets = build_datasets(trainer, progress, tokenizer, datasets_provider)
    files = together(lambda: data_fingerprints(datasets[0], begun.data_fingerprints), groups)
    print_once(groups, f"{summary(trainer)}\n{data_tables(trainer.arguments.data, datasets)}{loaded}")
    grouped_gemm = resolve_grouped_gemm(trainer, begun.grouped_gemm)
    if arguments.training.skip_train:
        evaluate_only(trainer, datasets, progress, stop_signal)
        return
    saver = None
    if arguments.checkpoint.save:
        record = RunRecord(schedule=schedule.settings(), data_fingerprints=files, grouped_gemm=grouped_gemm)
        saver = CheckpointSaver(trainer, record, lock.check if lock is not None else lambda: None)
    with GarbageCollection(arguments.training).running():
        train(trainer, datasets, progress, stop_signal, saver)


def _with_vocabulary(model: ModelConfig, tokenizer_size: int) -> ModelConfig:
    if model.vocab_size is None:
        return replace(model, vocab_size=tokenizer_size)
    if tokenizer_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer_size} entries but the model's vocabulary only {model.vocab_size}: use the "
            "tokenizer the model was made with, or a larger --vocab-size"
        )
    return model


def _set_expert_share(trainer: Trainer, progress: Progress) -> None:
    """Tells routers with `global_aux_loss` how the last step's tokens were shared out."""
    if progress.tokens_per_expert is None:
        return
    with waiting("the device"):
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
    results = run_microbatches(trainer, source, num_microbatches, progress.consumed_samples, scale)
    trainer.buffers.finalize()
    rates = trainer.schedule.rates(progress.scheduled_samples)
    update = trainer.optimizer.step(rates, sum_of_losses(results))
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
        averages=averages,
        grad_norm=update.grad_norm,
        loss_scale=update.loss_scale,
        learning_rate=rates.learning_rate,
        global_batch_size=batch_size,
        tokens_per_second=batch_size * trainer.arguments.data.seq_length / seconds,
        skipped=not update.updated,
        overflow_may_be_the_scale=update.overflow_may_be_the_scale,
        seconds=seconds,
    )
    return record, averages.stop


def evaluate_only(
    trainer: Trainer, datasets: tuple[Any, Any, Any], progress: Progress, stop_signal: StopSignal
) -> None:
    """Evaluates on the validation and the test split, for --skip-train."""
    log = _open_log(trainer, progress.iteration, None)  # the run itself may be going on, and write there too
    print_once(trainer.groups, f"--skip-train: iteration {progress.iteration} is evaluated, not trained")
    sets = [dataset for dataset in datasets[1:] if dataset is not None]
    if warms_up(trainer) and sets:
        warm_up(trainer, batches(trainer, sets[0], 0), trains=False, evaluates=True)
    for split, dataset in zip(("validation", "test"), datasets[1:], strict=True):
        if dataset is None:
            print_once(trainer.groups, f"there are no documents for the {split} split, so no evaluation: see --split")
        elif not _evaluate_and_log(trainer, split, dataset, progress, log, stop_signal):
            break
    if log is not None:
        log.close()


def train(
    trainer: Trainer,
    datasets: tuple[Any, Any, Any],
    progress: Progress,
    stop_signal: StopSignal,
    saver: CheckpointSaver | None,
) -> None:
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
    garbage = GarbageCollection(training)
    saved_at = evaluated_at = progress.iteration
    skipped_in_a_row = 0
    source = batches(trainer, train_set, progress.consumed_samples) if progress.iteration < last else iter(())
    if warms_up(trainer) and progress.iteration < last:
        source = warm_up(trainer, source, evaluates=validation_set is not None or test_set is not None)
    stop = False
    while progress.iteration < last and not stop:
        stop_signal.begin()
        record, stop = train_step(
            trainer, source, progress, lambda: stop_signal.received or time.monotonic() > deadline
        )
        stop_signal.end()
        if log is not None:
            log.step(record)
        if saver is not None:
            saver.poll(trainer.device)
        # steps that look for the right loss scale are no sign of trouble
        skipped_in_a_row = skipped_in_a_row + 1 if record.skipped and not record.overflow_may_be_the_scale else 0
        _check_skipped(training, record, skipped_in_a_row, saver)
        iteration = progress.iteration
        garbage.step(iteration)
        interval = arguments.checkpoint.save_interval
        if saver is not None and interval and iteration % interval == 0:
            _save(saver, trainer, progress)
            saved_at = iteration
            stop = stop or largest((stop_signal.received,), trainer.groups)[0] > 0
        # no evaluation after a request to stop
        due = training.eval_interval and iteration % training.eval_interval == 0 and not stop
        if validation_set is not None and due:
            stop = not _evaluate_and_log(trainer, "validation", validation_set, progress, log, stop_signal)
            evaluated_at = iteration
        stop = stop or bool(training.exit_interval and iteration % training.exit_interval == 0)
    if saver is not None:
        if saved_at != progress.iteration:
            _save(saver, trainer, progress)
        saver.finish()
    finished = progress.iteration >= last
    if finished and validation_set is not None and evaluated_at != progress.iteration:
        stop = stop or not _evaluate_and_log(trainer, "validation", validation_set, progress, log, stop_signal)
    if finished and test_set is not None and not stop:
        stop = not _evaluate_and_log(trainer, "test", test_set, progress, log, stop_signal)
    stop_signal.farewell = _farewell(arguments, progress.iteration, last, stop_signal)
    if stop or not finished:
        print_once(trainer.groups, stop_signal.farewell)
        stop_signal.said = True
    if log is not None:
        log.close()


def _farewell(arguments: Arguments, iteration: int, last: int, stop_signal: StopSignal) -> str:
    """What was done, of a run that ends early."""
    folder = arguments.checkpoint.save
    saved = f"everything is saved in {folder}" if folder else "nothing is saved, for want of --save"
    again = "; the same command continues" if folder and iteration < last else ""
    by = f" by {stop_signal.name}" if stop_signal.received else ""
    return f"stopped{by} at iteration {iteration} of {last}: {saved}{again}"


def _evaluate_and_log(
    trainer: Trainer, split: str, dataset: Any, progress: Progress, log: MetricsLog | None, stop_signal: StopSignal
) -> bool:
    """Whether the evaluation was carried through: a signal cuts it short."""
    with GarbageCollection(trainer.arguments.training).evaluation():
        loss = evaluate(trainer, dataset, split, stop_signal)
    if loss is None:
        print_once(trainer.groups, f"the evaluation on the {split} split was cut short, as asked by a signal")
    elif log is not None:
        log.evaluation(split, progress.iteration, progress.consumed_samples, loss)
    return loss is not None


def _check_skipped(training: TrainingConfig, record: StepRecord, in_a_row: int, saver: CheckpointSaver | None) -> None:
    """Raises SharedError if too many iterations in a row were skipped because they were not finite."""
    if in_a_row >= (1 if training.check_for_nan_in_loss_and_grad else training.max_skipped_iterations):
        if saver is not None:
            saver.finish()
        loss = record.averages.lm_loss
        raise SharedError(
            f"the loss or the gradients of {in_a_row} iteration(s) in a row, up to {record.iteration}, were not finite "
            f"(loss {loss}): lower --lr or look at the data; nothing was saved after the last checkpoint"
        )


def _open_log(trainer: Trainer, last: int, resumed_at: int | None) -> MetricsLog | None:
    """The log on the first rank, None on the others."""
    length = trainer.arguments.data.seq_length
    model, logging = trainer.arguments.model, trainer.arguments.logging
    flops = length * training_flops_per_token(model, trainer.model.first.table, length)

    def make() -> MetricsLog | None:
        if not trainer.groups.world.is_first:
            return None
        return MetricsLog(
            logging,
            total_iterations=last,
            flops_per_sample_and_rank=flops / trainer.groups.world.size,
            resumed_at=resumed_at,
            peak_tflops=logging.peak_tflops or peak_tflops(trainer.device, model.dtype),
            folder=Path(trainer.arguments.checkpoint.save or "."),
            settings=asdict(trainer.arguments),
        )

    return together(make, trainer.groups)


def _save(saver: CheckpointSaver, trainer: Trainer, progress: Progress) -> None:
    trainer.buffers.wait_for_parameters()
    saver.save(progress)
