"""What a resumed run does otherwise than the run that saved its checkpoint."""

from collections.abc import Mapping
from typing import Any

from megatron.training.arguments import SHAPE_FIELDS

# Settings that leave the numbers of a run as they are, or that are compared elsewhere; every other one is named if it
# has changed, so that a new flag is named unless it is written here. Sections that are not here (what is saved, logged
# and computed again) change no number.
WITHOUT_EFFECT = {
    "model": (
        # compared with the weights, when they are read
        *SHAPE_FIELDS, "make_vocab_size_divisible_by",
        # how, not what
        "init_method_std", "moe_token_dispatcher_type", "moe_grouped_gemm_backend",
        "moe_grouped_wgrad_backend",
    ),
    "parallel": (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank", "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
        "no_overlap_p2p_communication", "expert_model_parallel_size", "expert_tensor_parallel_size",
        "context_parallel_size", "sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce",
        "overlap_param_gather", "ddp_bucket_size",
    ),
    "optimizer": (
        # the schedule, which is refused if it differs
        "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples",
        "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_warmup_iters", "lr_warmup_samples",
        "lr_warmup_fraction", "lr_warmup_init", "weight_decay", "start_weight_decay", "end_weight_decay",
        "weight_decay_incr_style", "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler",
        # where a dynamic scale begins
        "initial_loss_scale",
        # where it is done
        "optimizer_cpu_offload", "optimizer_offload_fraction", "no_pin_cpu_grads", "no_pin_cpu_params",
        # what is converted, which is said where that is done
        "use_precision_aware_optimizer", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype",
    ),
    "tokenizer": ("trust_remote_code",),
    "data": ("data_cache_path", "num_workers"),
    "training": (
        "train_iters", "train_samples", "eval_interval", "eval_iters", "exit_interval", "exit_duration_in_mins",
        "exit_signal_handler", "max_skipped_iterations", "check_for_nan_in_loss_and_grad", "dry_run", "gpu_memory",
        "suggest",
        "device", "distributed_timeout_minutes", "deterministic_mode", "skip_train", "manual_gc", "manual_gc_interval",
        "no_manual_gc_eval",
    ),
}  # fmt: skip


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A phrase for every setting that is not what it was and that a result depends on.

    `saved` holds the settings of a checkpoint by name, `now` those of this run by section and name. What a checkpoint
    does not know is passed over, since other programs and earlier versions have other flags.
    """
    return [
        f"--{name.replace('_', '-')} was {_said(saved[name])}, is {_said(value)}"
        for section, unimportant in WITHOUT_EFFECT.items()
        for name, value in now[section].items()
        if name not in unimportant and name in saved and _plain(saved[name]) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    """A value as a checkpoint holds it: JSON has no tuples, and nothing given is nothing."""
    return " ".join(map(str, value)) or None if isinstance(value, (list, tuple)) else value


def _said(value: Any) -> str:
    plain = _plain(value)
    return "not given" if plain is None else str(plain)
