"""Frozen configuration of the optimizer; its fields are flags, as those of `megatron.core.config`."""

from dataclasses import dataclass
from typing import Literal

from megatron.core.config_checks import require_finite, require_positive
from megatron.core.fusions.stored import MasterType, MomentType


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its learning-rate schedule and gradient clipping."""

    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate the decay ends at."""
    decoupled_lr: float | None = None
    """Highest learning rate of the embedding and the output layer; --lr if not given."""
    decoupled_min_lr: float | None = None
    """Learning rate their decay ends at; --min-lr if not given."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay after warm-up; WSD stays at --lr until the last --lr-wsd-decay-iters."""
    lr_decay_iters: int | None = None
    """Iterations until the decay reaches --min-lr; --train-iters if not given."""
    lr_decay_samples: int | None = None
    """The same in samples, for --train-samples runs."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the last phase of a WSD (warmup-stable-decay) schedule."""
    lr_wsd_decay_iters: int | None = None
    """Iterations of the last phase of a WSD schedule, the end of the --lr-decay-iters."""
    lr_wsd_decay_samples: int | None = None
    """The same in samples, for --train-samples runs."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from --lr-warmup-init."""
    lr_warmup_samples: int = 0
    """The same in samples, for --train-samples runs."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of the decay length, instead of a number."""
    lr_warmup_init: float = 0.0
    """Learning rate the warm-up starts from."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norm weights are not decayed unless --apply-wd-to-norms."""
    start_weight_decay: float | None = None
    """Weight decay at the beginning, for --weight-decay-incr-style linear or cosine."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the run, for --weight-decay-incr-style linear or cosine."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay goes from its start to its end; constant is --weight-decay throughout."""
    apply_wd_to_norms: bool = False
    """Decay norm weights as well."""
    override_opt_param_scheduler: bool = False
    """Resume with the command line's schedule of learning rate and weight decay where the checkpoint has another."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Resume with the checkpoint's schedule of learning rate and weight decay."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon in the denominator of Adam."""
    use_precision_aware_optimizer: bool = False
    """Allow --main-params-dtype, --main-grads-dtype, --exp-avg-dtype and --exp-avg-sq-dtype below fp32."""
    main_params_dtype: MasterType = "fp32"
    """Masters of bfloat16 weights: fp32, or 16 bits that together with the weight are the same float32 number."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """What gradients of bfloat16 weights are accumulated and reduced in; bf16 is --grad-reduce-in-bf16."""
    exp_avg_dtype: MomentType = "fp32"
    """What first moments are kept in; fp16 and fp8 (float8_e4m3fn) with a scale for each 64."""
    exp_avg_sq_dtype: MomentType = "fp32"
    """What second moments are kept in."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    loss_scale: float | None = None
    """Constant factor of the loss; float16 has a dynamic one if not given, other types none."""
    initial_loss_scale: float = 2.0**32
    """Dynamic loss scale at the start."""
    min_loss_scale: float = 1.0
    """Lowest dynamic loss scale."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the dynamic loss scale doubles."""
    hysteresis: int = 2
    """From which overflow on the dynamic loss scale is halved; the count is reset when the scale doubles."""
    optimizer_cpu_offload: bool = False
    """Keep masters and moments of a GPU's parameters in the host's memory, and update them there."""
    optimizer_offload_fraction: float = 1.0
    """Share of the optimizer's state in the host's memory, with --optimizer-cpu-offload; the rest is on the device."""
    no_pin_cpu_grads: bool = False
    """Let gradients pass through host memory that is not pinned, where a GPU's copies do not overlap."""
    no_pin_cpu_params: bool = False
    """Let weights pass through host memory that is not pinned, where a GPU's copies do not overlap."""

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(
            self, "lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "adam_eps",
            "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
        )  # fmt: skip
        if self.lr < 0 or not 0 <= self.min_lr <= self.lr or self.lr_warmup_init > self.lr:
            raise ValueError(
                f"need 0 <= --min-lr <= --lr and --lr-warmup-init <= --lr, got "
                f"{self.min_lr}, {self.lr}, {self.lr_warmup_init}"
            )
        if self.lr_warmup_fraction is not None and not 0 <= self.lr_warmup_fraction < 1:
            raise ValueError(f"--lr-warmup-fraction must be in [0, 1), got {self.lr_warmup_fraction}")
        if min(self.lr_warmup_iters, self.lr_warmup_samples, self.lr_warmup_init) < 0:
            raise ValueError("--lr-warmup-iters, --lr-warmup-samples and --lr-warmup-init must not be negative")
        self._check_decoupled()
        self._check_weight_decay()
        self._check_offload()
        self._check_precision()
        if self.use_checkpoint_opt_param_scheduler and self.override_opt_param_scheduler:
            raise ValueError(
                "give --override-opt_param-scheduler or --use-checkpoint-opt_param-scheduler, not both: they say the "
                "opposite"
            )
        if self.min_loss_scale > self.initial_loss_scale:
            raise ValueError(
                f"--min-loss-scale ({self.min_loss_scale}) exceeds --initial-loss-scale ({self.initial_loss_scale})"
            )
        if self.clip_grad < 0 or self.weight_decay < 0:
            raise ValueError("--clip-grad and --weight-decay must not be negative")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise ValueError(
                f"--adam-beta1 and --adam-beta2 must be in [0, 1), got {self.adam_beta1}, {self.adam_beta2}"
            )

    def _check_precision(self) -> None:
        for name in ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(self, name) != "fp32" and not self.use_precision_aware_optimizer:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} needs --use-precision-aware-optimizer"
                )

    def _check_decoupled(self) -> None:
        if self.decoupled_min_lr is not None and self.decoupled_lr is None:
            raise ValueError("--decoupled-min-lr needs --decoupled-lr")
        highest = self.lr if self.decoupled_lr is None else self.decoupled_lr
        lowest = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
        if not 0 <= lowest <= highest or self.lr_warmup_init > highest:
            raise ValueError(
                f"need 0 <= --decoupled-min-lr (or --min-lr) <= --decoupled-lr and --lr-warmup-init <= --decoupled-lr, "
                f"got {lowest}, {highest}, {self.lr_warmup_init}"
            )

    def _check_weight_decay(self) -> None:
        ends = (self.start_weight_decay, self.end_weight_decay)
        if self.weight_decay_incr_style == "constant":
            if ends != (None, None):
                raise ValueError(
                    "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine"
                )
        elif any(value is None or value < 0 for value in ends):
            raise ValueError(
                f"--weight-decay-incr-style {self.weight_decay_incr_style} needs --start-weight-decay and "
                f"--end-weight-decay of at least 0, got {ends[0]} and {ends[1]}"
            )

    def _check_offload(self) -> None:
        if not 0 <= self.optimizer_offload_fraction <= 1:
            raise ValueError(
                f"--optimizer-offload-fraction is a share from 0 to 1, got {self.optimizer_offload_fraction}"
            )
        for name in ("optimizer_offload_fraction", "no_pin_cpu_grads", "no_pin_cpu_params"):
            if not self.optimizer_cpu_offload and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name.replace('_', '-')} needs --optimizer-cpu-offload: add it")
