"""Frozen configuration of the training loop, its checkpoints and its logs; every field is a command-line flag."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config import DataConfig, ModelConfig, ParallelConfig, TokenizerConfig
from megatron.core.config_checks import require_positive
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.recompute import RecomputeConfig
from megatron.training.batch_schedule import BatchSchedule, build_batch_schedule


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, on what device and in which batches."""

    micro_batch_size: int = 1
    """Samples in one forward pass of one model replica."""
    global_batch_size: int | None = None
    """Samples in one step over all replicas; micro batch x data-parallel size if not given."""
    rampup_batch_size: tuple[int, ...] = ()
    """START INCREMENT SAMPLES: begin with START samples in a step and add INCREMENT at a time, so that the batch is
    --global-batch-size after SAMPLES samples."""
    train_iters: int | None = None
    """Steps to train."""
    train_samples: int | None = None
    """Samples to train, instead of --train-iters."""
    eval_interval: int = 1000
    """Steps between evaluations on the validation split; 0 for none."""
    eval_iters: int = 100
    """Global batches in one evaluation, always the same ones; 0 for none."""
    skip_train: bool = False
    """Take no step and save nothing: evaluate what was loaded on the validation and the test split, and end."""
    exit_interval: int | None = None
    """Save and exit when the iteration is a multiple of this."""
    exit_duration_in_mins: float | None = None
    """Save and exit after this many minutes."""
    exit_signal_handler: bool = False
    """Save and exit on SIGTERM, Ctrl-C or SIGHUP; ranks end with status 0, torchrun itself reports the signal."""
    max_skipped_iterations: int = 10
    """End with an error after this many iterations in a row whose loss or gradients were not finite."""
    check_for_nan_in_loss_and_grad: bool = False
    """End with an error at the first loss or gradient that is not finite, instead of skipping the iteration."""
    dry_run: str | None = None
    """RANK/WORLD: build that rank of a job of WORLD ranks in one process without a device, print its shapes,
    parameters and memory, and end."""
    gpu_memory: float | None = None
    """GiB of memory of a GPU, for --dry-run to say whether the job fits; that of this machine's GPU if not given."""
    suggest: float | None = None
    """GiB of memory of a GPU: with --dry-run, find the cheapest change of flags with which the job fits."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train: CUDA with NCCL where there are GPUs, otherwise CPU with gloo."""
    distributed_timeout_minutes: int = 10
    """How long a collective waits for a rank before the job fails."""
    manual_gc: bool = False
    """Let Python collect garbage at the same steps on all ranks, so that none waits for the pauses of the others."""
    manual_gc_interval: int = 0
    """Steps between these collections; 0 for none but those of --manual-gc around evaluations."""
    no_manual_gc_eval: bool = False
    """With --manual-gc, leave out the collections before and after evaluations."""
    deterministic_mode: bool = False
    """Use only algorithms that give the same bits in every run; on the CPU all do, on GPUs some faster ones do not."""

    def __post_init__(self) -> None:
        if self.gpu_memory is not None and (self.dry_run is None or not self.gpu_memory > 0):
            raise ValueError(f"--gpu-memory is a number of GiB for --dry-run, got {self.gpu_memory}")
        if self.suggest is not None and (self.dry_run is None or not self.suggest > 0):
            raise ValueError(f"--suggest is a number of GiB for --dry-run, got {self.suggest}")
        require_positive(self, "micro_batch_size", "global_batch_size", "exit_interval", "exit_duration_in_mins")
        if (self.train_iters is None) == (self.train_samples is None):
            raise ValueError("give exactly one of --train-iters and --train-samples")
        if self.train_iters == 0 or self.train_samples == 0:
            raise ValueError("--train-iters and --train-samples must be positive")
        if min(self.train_iters or 0, self.train_samples or 0, self.eval_iters, self.eval_interval) < 0:
            raise ValueError("--train-iters, --train-samples, --eval-iters and --eval-interval must not be negative")
        if self.manual_gc_interval < 0:
            raise ValueError(f"--manual-gc-interval must not be negative, got {self.manual_gc_interval}")
        if self.skip_train and not self.eval_iters:
            raise ValueError("--skip-train only evaluates, and --eval-iters 0 leaves nothing to do: raise --eval-iters")
        if self.max_skipped_iterations <= 0 or self.distributed_timeout_minutes <= 0:
            raise ValueError("--max-skipped-iterations and --distributed-timeout-minutes must be positive")

    def batches(self, data_parallel_size: int) -> BatchSchedule:
        """Samples in each step. Raises ValueError if the micro-batches cannot be shared out evenly."""
        return build_batch_schedule(
            self.global_batch_size, self.rampup_batch_size, self.micro_batch_size, data_parallel_size
        )

    def last_iteration(self, batches: BatchSchedule, iteration: int, consumed_samples: int) -> int:
        """Number of the run's last step, seen from a step already taken (with other batch sizes, perhaps)."""
        if self.train_iters is not None:
            return self.train_iters
        assert self.train_samples is not None
        return iteration + batches.iterations_within(self.train_samples, consumed_samples)

    def total_samples(self, batches: BatchSchedule) -> int:
        """Samples of the whole run."""
        return self.train_samples if self.train_samples is not None else batches.samples_after(self.train_iters or 0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is loaded at the start and saved on the way."""

    save: str | None = None
    """Folder to save checkpoints to."""
    load: str | None = None
    """Folder to load the newest checkpoint from. Equal to --save, it may still be empty on the first run."""
    save_interval: int | None = None
    """Steps between checkpoints; the last step is saved in any case."""
    exit_on_missing_checkpoint: bool = False
    """Fail if there is no checkpoint in --load, even where that is the first run's --save folder."""
    finetune: bool = False
    """Load weights only and start at iteration 0 with a fresh optimizer and the data from its beginning."""
    no_load_optim: bool = False
    """Do not load the optimizer's state (weights come from the checkpoint, moments start at zero)."""
    no_load_rng: bool = False
    """Do not load random number states."""
    no_save_optim: bool = False
    """Do not save the optimizer's state; such a checkpoint cannot be resumed exactly."""
    use_checkpoint_args: bool = False
    """Take the model's shape from the checkpoint instead of the command line."""
    ckpt_format: Literal["sharded", "torch"] = "sharded"
    """Format of saved checkpoints: sharded (also torch_dist) resumes at any layout, torch is Megatron's file a rank."""
    async_save: bool = False
    """Copy checkpoints to host memory and write them while training goes on."""
    keep_last_checkpoints: int | None = None
    """Keep this many of the newest complete checkpoints in --save and remove older ones; all if not given."""
    save_retain_interval: int | None = None
    """Remove older checkpoints apart from those of iterations that are multiples of this."""

    def __post_init__(self) -> None:
        require_positive(self, "save_interval", "keep_last_checkpoints", "save_retain_interval")
        if self.async_save and self.ckpt_format == "torch":
            raise ValueError("--async-save needs --ckpt-format sharded")
        if self.use_checkpoint_args and not self.load:
            raise ValueError("--use-checkpoint-args needs --load")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is printed and recorded."""

    log_interval: int = 100
    """Steps between log lines."""
    log_throughput: bool = False
    """Print TFLOP/s per GPU, counted from active parameters and attention, and MFU, their share of the GPU's peak."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for MFU; in 16 bits that of common NVIDIA GPUs is known."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files."""
    tensorboard_log_interval: int | None = None
    """Steps between records in TensorBoard and the loggers; --log-interval if not given."""
    logger: tuple[str, ...] = ()
    """Loggers that get what TensorBoard gets: wandb, mlflow, trackio. Each is a package to be installed."""
    wandb_project: str | None = None
    """Project of the loggers, in MLflow the experiment; turns wandb on where no --logger is given."""
    wandb_exp_name: str | None = None
    """Name of the run in the loggers; they make one up if not given."""
    wandb_entity: str | None = None
    """User or team that the project of wandb belongs to."""
    wandb_save_dir: str | None = None
    """Folder for the loggers' files and the identity by which a resumed run goes on; in --save if not given."""
    metrics_path: str | None = None
    """File that gets one JSON line an iteration, with numbers in full precision."""
    moe_per_layer_logging: bool = False
    """Record the load of every layer's experts in TensorBoard and the metrics file, not only the whole model's."""

    def __post_init__(self) -> None:
        require_positive(self, "log_interval", "peak_tflops", "tensorboard_log_interval")
        unknown = [name for name in self.logger if name not in ("wandb", "mlflow", "trackio")]
        if unknown:
            raise ValueError(f"--logger {unknown[0]}: there is no such logger; choose from wandb, mlflow and trackio")

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The loggers besides TensorBoard."""
        return tuple(dict.fromkeys(self.logger)) or (("wandb",) if self.wandb_project else ())


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """All settings of a run."""

    model: ModelConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    optimizer: OptimizerConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
