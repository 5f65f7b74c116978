"""Flags of Megatron-LM scripts that need no setting here, so that a user's script runs unchanged.

A flag that would change the result and is not supported is refused; one that only tunes speed or memory is accepted
and named in one line.
"""

from collections.abc import Sequence
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


def _flags(kind: Any, values: Any, names: str) -> dict[str, CompatibilityFlag]:
    return {name: CompatibilityFlag(kind, values) for name in names.split()}


COMPATIBILITY_FLAGS: dict[str, CompatibilityFlag] = {
    **_flags("implied", "", """
        use-mcore-models disable-bias-linear swiglu untie-embeddings-and-output-weights group-query-attention
        no-position-embedding no-masked-softmax-fusion moe-grouped-gemm accumulate-allreduce-grads-in-fp32
        no-bias-swiglu-fusion no-bias-gelu-fusion no-bias-dropout-fusion use-rotary-position-embeddings
        attention-softmax-in-fp32 use-cpu-initialization no-create-attention-mask-in-dataloader auto-detect-ckpt-format
        no-check-for-nan-in-loss-and-grad overlap-p2p-communication overlap-p2p-communication-warmup-flush use-dist-ckpt
        overlap-cpu-optimizer-d2h-h2d dist-ckpt-optim-fully-reshardable verify-integrity
        log-validation-ppl-to-tensorboard log-loss-scale-to-tensorboard log-batch-size-to-tensorboard
        log-learning-rate-to-tensorboard
    """),
    # kernels, streams and memory
    **_flags("no effect", "", """
        moe-permute-fusion moe-router-fusion moe-use-legacy-grouped-gemm use-flash-attn no-gradient-accumulation-fusion
        no-rope-fusion no-persist-layer-norm cross-entropy-loss-fusion disable-jit-fuser use-transformer-engine-op-fuser
        use-te-activation-func fused-residual-rmsnorm enable-experimental apply-query-key-layer-scaling
        delay-wgrad-compute defer-embedding-wgrad-compute distribute-saved-activations enable-cuda-graph
        external-cuda-graph cuda-graph-retain-backward-graph te-rng-tracker optimizer-cuda-graph
        use-torch-optimizer-for-cpu-offload fine-grained-activation-offloading init-model-with-meta-device
    """),
    **_flags("no effect", "one", """
        transformer-impl attention-backend flash-attention-version cross-entropy-fusion-impl wgrad-deferral-limit
        cuda-graph-impl cuda-graph-warmup-steps cpu-offloading-num-layers empty-unused-memory-level
    """),
    **_flags("no effect", "many", "cuda-graph-scope cuda-graph-modules offload-modules"),
    # messages between ranks
    **_flags("no effect", "", """
        tp-comm-overlap disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs tp-comm-overlap-rs-dgrad
        disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-split-ag disable-tp-comm-split-rs
        tp-comm-overlap-disable-qkv tp-comm-overlap-disable-fc1 no-async-tensor-model-parallel-allreduce
        use-ring-exchange-p2p overlap-moe-expert-parallel-comm overlap-dispatch-backward-with-experts-wgrad
        ep-overlap-early-attn-memory-release high-priority-a2a-comm-stream moe-enable-deepep
        moe-permute-fusion-into-hybridep moe-shared-expert-overlap overlap-param-gather-with-optimizer-step
        no-align-grad-reduce no-align-param-gather ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw
        ddp-reduce-scatter-with-fp32-accumulation use-nccl-ub disable-symmetric-registration
        no-gradient-reduce-div-fusion use-sharp disable-gloo-process-groups create-all-gather-group use-tp-pp-dp-mapping
    """),
    **_flags("no effect", "one", """
        tp-comm-overlap-cfg tp-comm-bootstrap-backend moe-flex-dispatcher-backend moe-deepep-num-sms
        moe-hybridep-num-sms moe-flex-dispatcher-num-sms ddp-num-buckets num-distributed-optimizer-instances
        nccl-communicator-config-path sharp-enabled-group microbatch-group-size-per-virtual-pipeline-stage
        pipeline-model-parallel-comm-backend distributed-timeout-seconds-after-init local-rank
        data-parallel-sharding-strategy
    """),
    **_flags("no effect", "many", "cp-comm-type hierarchical-context-parallel-sizes high-priority-stream-groups"),
    # what --fp8-format alone turns on
    **_flags("no effect", "", """
        fp8-param-gather no-fp8-wgrad moe-router-padding-for-fp8 moe-router-padding-for-quantization
        reuse-grad-buf-for-mxfp8-param-ag keep-fp8-transpose-cache first-last-layers-bf16 tp-only-amax-red
    """),
    **_flags("no effect", "one", """
        fp8-recipe fp8-margin fp8-interval fp8-amax-history-len fp8-amax-compute-algo num-layers-at-start-in-bf16
        num-layers-at-end-in-bf16
    """),
    # checkpoints and data files
    **_flags("no effect", "", """
        ckpt-fully-parallel-save no-ckpt-fully-parallel-save ckpt-fully-parallel-load no-ckpt-fully-parallel-load
        ckpt-assume-constant-structure exit-signal-handler-for-dataloader use-persistent-ckpt-worker
        dist-ckpt-save-pre-mcore-014 ckpt-fully-parallel-load-per-rank-objects
        distrib-optim-fully-reshardable-mem-efficient async-ckpt-use-cpu-shm no-save-rng no-mmap-bin-files
        dataloader-fast-cache-load dataloader-defer-npy-index-mmap enable-msc disable-msc
    """),
    **_flags("no effect", "one", """
        dist-ckpt-strictness dist-ckpt-format dist-ckpt-workers async-strategy async-ckpt-cpu-priority
        async-ckpt-io-priority ckpt-fully-parallel-load-exchange-algo ckpt-fully-parallel-save-process-group
        ckpt-fully-parallel-load-process-group non-persistent-save-interval non-persistent-ckpt-type
        non-persistent-global-ckpt-dir non-persistent-local-ckpt-dir non-persistent-local-ckpt-algo
        num-dataset-builder-threads object-storage-cache-path
    """),
    # logs, profiles and watching over the job
    **_flags("no effect", "", """
        log-progress log-params-norm log-num-zeros-in-grad log-timers-to-tensorboard log-memory-to-tensorboard
        log-world-size-to-tensorboard no-log-loss-scale-to-tensorboard no-log-learning-rate-to-tensorboard log-straggler
        disable-straggler-on-startup log-energy log-device-memory-used log-max-attention-logit
        no-barrier-with-level-1-timing profile use-pytorch-profiler pytorch-profiler-collect-shapes
        pytorch-profiler-collect-callstack pytorch-profiler-collect-chakra nvtx-ranges record-shapes
        record-memory-history run-workload-inspector-server no-one-logger enable-one-logger one-logger-async
        otel-enabled enable-ft-package calc-ft-timeouts check-for-spiky-loss check-for-large-grads
        flight-recorder-include-stack-trace
    """),
    **_flags("no effect", "one", """
        timing-log-level timing-log-option tensorboard-queue-size logging-level log-memory-interval config-logger-dir
        straggler-ctrlr-port straggler-minmax-count profile-step-start profile-step-end memory-snapshot-path
        one-logger-project one-logger-run-name app-tag-run-name app-tag-run-version otel-service-name otel-span-groups
        rerun-mode train-sync-interval gpu-sniff-test-interval check-weight-hash-across-dp-replicas-interval
        flight-recorder-dump-path flight-recorder-trace-buffer-size
    """),
    **_flags("no effect", "many", "profile-ranks"),
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
    "moe-router-score-function": CompatibilityFlag("only", "one", ("softmax",), "Mixtral has no other."),
    "window-size": CompatibilityFlag("refused", "many"),
    "fp8-format": CompatibilityFlag("refused", "one", (), "Products are made in the type of --params-dtype."),
    "fp4-format": CompatibilityFlag("refused", "one", (), "Products are made in the type of --params-dtype."),
    "calculate-per-token-loss": CompatibilityFlag(
        "refused", "", (), "Each microbatch has the same weight, and its loss is the mean over its tokens."
    ),
    "moe-router-pre-softmax": CompatibilityFlag(
        "refused", "", (), "Mixtral takes the softmax over the chosen experts, so that their weights sum to 1."
    ),
    "moe-router-enable-expert-bias": CompatibilityFlag("refused", "", (), "Mixtral's router has no bias."),
    "moe-router-force-load-balancing": CompatibilityFlag("refused", "", (), "It sends tokens to experts at random."),
    "moe-shared-expert-intermediate-size": CompatibilityFlag("refused", "one", (), "Mixtral has no shared experts."),
    "pipeline-model-parallel-layout": CompatibilityFlag(
        "refused", "one", (),
        "Give uneven stages by --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers.",
    ),
    **{
        name: CompatibilityFlag("refused", "", (), "--use-distributed-optimizer shares out the optimizer (ZeRO-1).")
        for name in ("use-megatron-fsdp", "use-custom-fsdp", "use-torch-fsdp2")
    },
}  # fmt: skip

# Values that Megatron-LM has and that training has under another name, or without another way of sending messages.
_SAME_RESULT = {
    "--moe-token-dispatcher-type": {"flex": "alltoall", "alltoall_seq": "alltoall"},
    "--tokenizer-type": {
        "HuggingFaceTokenizer": "PretrainedTokenizerFromHF",
        "GPTSentencePieceTokenizer": "Llama2Tokenizer",
    },
}
# Values that stand for one of ours with another result, and what it is.
_OTHER_RESULT = {
    "--ckpt-format": {
        "torch_dist": ("sharded", "this toolkit's own format, which Megatron-LM reads once it is converted")
    },
}


def with_values_of_ours(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command line with values of Megatron-LM that stand for one of ours replaced by it, and remarks on them."""
    replaced, remarks = list(arguments), []
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if not equals:
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
        ours, reason = _OTHER_RESULT.get(flag, {}).get(value, (None, ""))
        if ours is None:
            ours, reason = _SAME_RESULT.get(flag, {}).get(value), "with the same result"
        if ours is not None:
            replaced[place if equals else place + 1] = f"{flag}={ours}" if equals else ours
            remarks.append(f"{flag} {ours} is taken for {value}, {reason}")
    return replaced, remarks


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


def take_expert_width(given: dict[str, Any]) -> None:
    """Takes --moe-ffn-hidden-size out of `given`. Raises ValueError if it is not the width that the model has."""
    width = given.pop("moe_ffn_hidden_size", None)
    if width is not None and given.setdefault("ffn_hidden_size", width) != width:
        raise ValueError(
            f"--moe-ffn-hidden-size {width} is not --ffn-hidden-size {given['ffn_hidden_size']}: every layer of a "
            "Mixtral has experts, and --ffn-hidden-size is their width; give the width of an expert for both"
        )
