"""Flags of Megatron-LM scripts that need no setting here, so that a user's script runs unchanged.

A flag that would change the result and is not supported is refused; one that only tunes speed or memory is accepted
and named in one line.
"""

from typing import Any, Literal, NamedTuple


class CompatibilityFlag(NamedTuple):
    """How a flag without a field is treated."""

    kind: Literal["implied", "no effect", "only", "refused"]
    values: Literal["", "one", "many"] = ""
    """How many values the flag takes."""
    allowed: tuple[str, ...] = ()
    """For kind "only": the values that mean what is done anyway."""
    reason: str = ""

    @property
    def help(self) -> str:
        """Text for --help."""
        if self.kind == "only":
            return f"Only {' or '.join(self.allowed)}. {self.reason}".strip()
        texts = {"implied": "Always so.", "no effect": "Accepted without effect.", "refused": "Not supported."}
        return f"{texts[self.kind]} {self.reason}".strip()


def _flags(kind: Any, values: Any, *names: str) -> dict[str, CompatibilityFlag]:
    return {name: CompatibilityFlag(kind, values) for name in names}


COMPATIBILITY_FLAGS: dict[str, CompatibilityFlag] = {
    **_flags(
        "implied", "", "use-mcore-models", "disable-bias-linear", "swiglu", "untie-embeddings-and-output-weights",
        "group-query-attention", "no-position-embedding", "no-masked-softmax-fusion", "moe-grouped-gemm",
        "accumulate-allreduce-grads-in-fp32", "no-bias-swiglu-fusion",
        "no-bias-gelu-fusion", "no-bias-dropout-fusion", "use-rotary-position-embeddings",
    ),
    **_flags(
        "no effect", "", "moe-permute-fusion", "use-flash-attn",
        "no-gradient-accumulation-fusion", "no-rope-fusion", "no-persist-layer-norm",
        "cross-entropy-loss-fusion", "tp-comm-overlap", "manual-gc",
        "log-progress", "log-params-norm", "log-num-zeros-in-grad", "log-timers-to-tensorboard",
        "log-memory-to-tensorboard", "log-validation-ppl-to-tensorboard",
        "no-async-tensor-model-parallel-allreduce", "no-save-rng", "no-mmap-bin-files",
    ),
    **_flags(
        "no effect", "one", "transformer-impl", "wandb-project", "wandb-exp-name", "wandb-save-dir",
        "attention-backend", "manual-gc-interval", "timing-log-level", "tensorboard-log-interval",
        "tensorboard-queue-size", "local-rank",
    ),
    **_flags(
        "implied", "", "attention-softmax-in-fp32", "use-cpu-initialization", "no-create-attention-mask-in-dataloader",
        "auto-detect-ckpt-format", "no-check-for-nan-in-loss-and-grad", "overlap-p2p-communication",
        "overlap-p2p-communication-warmup-flush",
    ),
    **_flags(
        "no effect", "", "log-loss-scale-to-tensorboard", "log-batch-size-to-tensorboard",
        "log-world-size-to-tensorboard", "log-learning-rate-to-tensorboard", "distribute-saved-activations",
    ),
    **_flags(
        "no effect", "one", "wandb-entity", "empty-unused-memory-level", "dist-ckpt-format",
    ),
    "moe-layer-freq": CompatibilityFlag("only", "one", ("1",), "Every layer has experts."),
    "normalization": CompatibilityFlag("only", "one", ("RMSNorm",), "Mixtral has no other."),
    "position-embedding-type": CompatibilityFlag("only", "one", ("rope",), "Mixtral has no other."),
    "attention-dropout": CompatibilityFlag("only", "one", ("0", "0.0"), "Dropout is not part of Mixtral."),
    "hidden-dropout": CompatibilityFlag("only", "one", ("0", "0.0"), "Dropout is not part of Mixtral."),
    "rotary-percent": CompatibilityFlag("only", "one", ("1", "1.0"), "Mixtral rotates whole heads."),
    "moe-router-dtype": CompatibilityFlag("only", "one", ("fp32",), "The router always computes in float32."),
    "distributed-backend": CompatibilityFlag("only", "one", ("nccl", "gloo"), "It follows --device."),
    "model-type": CompatibilityFlag("only", "one", ("GPT",)),
    "optimizer": CompatibilityFlag("only", "one", ("adam",)),
    "dataset-impl": CompatibilityFlag("only", "one", ("mmap",)),
    "dataloader-type": CompatibilityFlag("only", "one", ("single",)),
    "window-size": CompatibilityFlag("refused", "many"),
}  # fmt: skip


def check_compatibility(given: dict[str, Any]) -> list[str]:
    """Takes the compatibility flags out of `given`; returns a remark if any has no effect.

    Raises ValueError for a value that would change the result and is not supported.
    """
    without_effect = []
    for name, flag in COMPATIBILITY_FLAGS.items():
        key = name.replace("-", "_")
        if key not in given:
            continue
        value = given.pop(key)
        if flag.kind == "refused":
            raise ValueError(f"--{name} is not supported: remove it. {flag.reason}".strip())
        if flag.kind == "only" and value not in flag.allowed:
            raise ValueError(
                f"--{name} {value} is not supported, only {' or '.join(flag.allowed)}. {flag.reason}".strip()
            )
        if flag.kind == "no effect":
            without_effect.append(f"--{name}")
    return [f"accepted without effect: {' '.join(without_effect)}"] if without_effect else []
