"""Command lines of NVIDIA's Mixtral scripts start as they are; flags that would change the result are refused."""

import pytest

from megatron.training.arguments import parse_arguments
from megatron.training.compatibility import COMPATIBILITY_FLAGS

PRECISION = "--use-precision-aware-optimizer"
SMALL = "--train-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 100".split()

# Megatron-MoE-ModelZoo, Mixtral 8x22B, with a dispatcher, a profile and the offloading that its launcher adds.
MODEL_ZOO = """
--distributed-timeout-minutes 60 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
--expert-model-parallel-size 8 --context-parallel-size 1 --expert-tensor-parallel-size 1 --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --use-mcore-models --sequence-parallel --use-flash-attn
--disable-bias-linear --micro-batch-size 1 --global-batch-size 256 --train-samples 268554688
--exit-duration-in-mins 230 --cross-entropy-loss-fusion --cross-entropy-fusion-impl native --manual-gc
--manual-gc-interval 50 --transformer-impl transformer_engine --data-cache-path cache --tokenizer-type Llama2Tokenizer
--tokenizer-model tokenizer.model --data-path my_text_document --split 99,1,0 --no-mmap-bin-files --num-workers 6
--untie-embeddings-and-output-weights --position-embedding-type rope --rotary-percent 1.0 --normalization RMSNorm
--swiglu --num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 --group-query-attention
--num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 --make-vocab-size-divisible-by 128
--attention-dropout 0.0 --hidden-dropout 0.0 --clip-grad 1.0 --weight-decay 0.1 --lr-decay-samples 255126953
--lr-warmup-samples 162761 --lr 1.2e-5 --min-lr 1.2e-6 --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95
--num-experts 8 --moe-router-load-balancing-type aux_loss --moe-router-topk 2 --moe-grouped-gemm
--moe-aux-loss-coeff 1e-2 --moe-permute-fusion --moe-router-fusion --enable-experimental --eval-iters 32
--eval-interval 500 --finetune --auto-detect-ckpt-format --load old --save checkpoints --no-ckpt-fully-parallel-save
--save-interval 500 --dist-ckpt-strictness log_all --init-method-std 0.008 --log-timers-to-tensorboard
--log-memory-to-tensorboard --log-num-zeros-in-grad --log-params-norm --log-validation-ppl-to-tensorboard
--log-throughput --log-interval 1 --tensorboard-dir tensorboard --wandb-project moe --wandb-exp-name 8x22B --bf16
--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep --moe-hybridep-num-sms 32 --tp-comm-overlap
--delay-wgrad-compute --overlap-moe-expert-parallel-comm --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d
--profile --profile-step-start 23 --profile-step-end 25 --profile-ranks 0 1 --use-pytorch-profiler
--use-precision-aware-optimizer --main-grads-dtype fp32 --main-params-dtype fp32
""".split()

# Flags that only those of Megatron-LM's own tests of Mixtral add.
FUNCTIONAL_TESTS = """
--no-rope-fusion --wandb-entity adlr --wandb-save-dir wandb --exit-interval 150 --attention-softmax-in-fp32
--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tokenizer.model
""".split()


def test_the_model_zoos_script_runs_unchanged() -> None:
    arguments, remarks = parse_arguments(MODEL_ZOO)
    assert arguments.model.moe_token_dispatcher_type == "alltoall"
    assert arguments.training.manual_gc and arguments.training.manual_gc_interval == 50
    assert remarks[0] == "--moe-token-dispatcher-type alltoall is taken for flex, with the same result"
    named = remarks[1].removeprefix("accepted without effect: ").split()
    assert len(remarks) == 2 and {"--moe-router-fusion", "--dist-ckpt-strictness", "--profile-ranks"} <= set(named)
    assert not {"--swiglu", "--main-grads-dtype", "--manual-gc"} & set(named)


def test_the_flags_of_megatrons_own_tests_are_known() -> None:
    arguments, remarks = parse_arguments([*MODEL_ZOO, *FUNCTIONAL_TESTS])
    assert arguments.tokenizer.tokenizer_type == "Llama2Tokenizer" and arguments.training.exit_interval == 150
    assert "--tokenizer-type Llama2Tokenizer is taken for GPTSentencePieceTokenizer, with the same result" in remarks


def test_what_has_no_effect_is_named_and_changes_nothing() -> None:
    flags = {name: flag.values for name, flag in COMPATIBILITY_FLAGS.items() if flag.kind == "no effect"}
    values = {"": [], "one": ["7"], "many": ["7", "8"]}
    given = [word for name, takes in flags.items() for word in (f"--{name}", *values[takes])]
    arguments, remarks = parse_arguments([*SMALL, *given])
    assert remarks == ["accepted without effect: " + " ".join(f"--{name}" for name in flags)]
    assert arguments == parse_arguments(SMALL)[0]


@pytest.mark.parametrize("flags", ["--ckpt-format torch_dist", "--ckpt_format=torch_dist"])
def test_megatrons_name_of_the_default_format_means_ours_and_one_line_says_so(flags: str) -> None:
    arguments, remarks = parse_arguments([*SMALL, *flags.split()])
    assert arguments == parse_arguments(SMALL)[0] and arguments.checkpoint.ckpt_format == "sharded"
    said = (
        "--ckpt-format sharded is taken for torch_dist, this toolkit's own format, which Megatron-LM reads once it is"
    )
    assert len(remarks) == 1 and remarks[0].startswith(said)


@pytest.mark.parametrize(
    ("flags", "dispatcher"),
    [
        ("--moe-token-dispatcher-type=flex", "alltoall"),
        ("--moe_token_dispatcher_type alltoall_seq", "alltoall"),
        ("--moe-token-dispatcher-type allgather --data-cache-path flex", "allgather"),
    ],
)
def test_a_dispatcher_of_megatrons_is_replaced_by_one_of_ours(flags: str, dispatcher: str) -> None:
    assert parse_arguments([*SMALL, *flags.split()])[0].model.moe_token_dispatcher_type == dispatcher


def test_the_width_of_an_expert_has_two_names() -> None:
    def width(flags: str) -> int:
        return parse_arguments([*SMALL, *flags.split()])[0].model.ffn_hidden_size

    assert width("--moe-ffn-hidden-size 512") == width("--ffn-hidden-size 512 --moe-ffn-hidden-size 512") == 512
    with pytest.raises(ValueError, match="--moe-ffn-hidden-size 256 is not --ffn-hidden-size 512: every layer"):
        width("--ffn-hidden-size 512 --moe-ffn-hidden-size 256")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--fp8-format e4m3", "--fp8-format is not supported: remove it"),
        ("--exp-avg-dtype bf16", "--exp-avg-dtype bf16 needs --use-precision-aware-optimizer"),
        (f"{PRECISION} --main-params-dtype fp16", r"invalid choice: 'fp16' \(choose from .*bf16-remainder"),
        (f"{PRECISION} --main-params-dtype bf16-remainder", "for weights in bfloat16, these are in float32"),
        (f"{PRECISION} --fp16 --main-params-dtype bf16-remainder", "these are in float16: add --bf16 or leave it"),
        (f"{PRECISION} --fp16 --main-grads-dtype bf16", "--main-grads-dtype bf16 is for weights in bfloat16"),
        (f"{PRECISION} --params-dtype float64 --exp-avg-sq-dtype fp8", "these are in float64: leave it at fp32"),
        ("--moe-router-force-load-balancing", "at random"),
        ("--moe-router-pre-softmax", "sum to 1"),
        ("--calculate-per-token-loss", "same weight"),
        ("--moe-router-score-function sigmoid", "only softmax"),
        ("--pipeline-model-parallel-layout Et|t|L", "--decoder-first-pipeline-num-layers"),
        ("--use-megatron-fsdp", "--use-distributed-optimizer"),
        ("--moe-token-dispatcher-type deepep", "invalid choice: 'deepep'"),
        ("--moe-token-dispatcher-type", "expected one argument"),
        ("--skip-train --eval-iters 0", "leaves nothing to do"),
        ("--manual-gc --manual-gc-interval -1", "must not be negative"),
    ],
)
def test_what_would_change_the_result_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*SMALL, *flags.split()])
