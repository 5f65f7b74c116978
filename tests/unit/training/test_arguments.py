"""Flags: generated from the configuration, compatible with Megatron-LM's scripts, refused with a remedy."""

import dataclasses

import pytest

from megatron.core.config import ModelConfig
from megatron.core.parallel_state import grid_sizes
from megatron.training.arguments import SECTIONS, build_parser, field_help, parse_arguments
from megatron.training.compatibility import COMPATIBILITY_FLAGS
from megatron.training.config import TrainingConfig

# The arguments of the official Megatron-LM example for Mixtral 8x7B, at the layout of 16 GPUs.
OFFICIAL_SCRIPT = """
--use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01 --attention-dropout 0.0
--hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8 --no-masked-softmax-fusion
--no-position-embedding --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce --tokenizer-type Llama2Tokenizer
--tokenizer-model tokenizer.model --data-path my_text_document --split 99990,8,2 --micro-batch-size 1
--global-batch-size 256 --lr 1e-4 --train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5
--weight-decay 0.1 --lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 4
--pipeline-model-parallel-size 4 --expert-model-parallel-size 1 --use-distributed-optimizer --sequence-parallel
--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10 --save ckpt --load ckpt
--tensorboard-dir tb --no-load-optim --no-load-rng --wandb-project Mixtral --wandb-exp-name 8x7B
""".split()
SMALL = "--train-iters 1 --mock-data --tokenizer-type NullTokenizer --vocab-size 100".split()


def test_the_official_script_runs_unchanged() -> None:
    arguments, remarks = parse_arguments(OFFICIAL_SCRIPT)
    assert arguments.model.params_dtype == "bfloat16" and arguments.model.rotary_base == 1e6
    assert arguments.parallel.sequence_parallel and arguments.data.data_path == ("my_text_document",)
    assert remarks == []
    assert arguments.parallel.use_distributed_optimizer and arguments.parallel.overlap_param_gather
    assert arguments.logging.logger_names == ("wandb",)


def test_every_field_is_a_flag_with_a_help_text() -> None:
    options = {option for action in build_parser()._actions for option in action.option_strings}
    for section in SECTIONS.values():
        sentences = field_help(section)
        for field in dataclasses.fields(section):
            assert f"--{field.name.replace('_', '-')}" in options
            assert sentences[field.name].endswith("."), field.name
    names = [field.name for section in SECTIONS.values() for field in dataclasses.fields(section)]
    assert len(names) == len(set(names))
    assert not set(COMPATIBILITY_FLAGS) & {name.replace("_", "-") for name in names}
    assert "--train-iters" in build_parser().format_help()


def test_underscores_and_equals_signs_are_accepted() -> None:
    arguments, _ = parse_arguments([*SMALL, "--micro_batch_size=4", "--data-cache-path=a_b=c", "--hidden_size", "128"])
    assert arguments.training.micro_batch_size == 4
    assert arguments.data.data_cache_path == "a_b=c"
    assert arguments.model.hidden_size == 128


def test_recomputation_is_chosen_by_flags() -> None:
    flags = "--recompute-granularity selective --recompute-modules core_attn moe_act"
    recompute = parse_arguments([*SMALL, *flags.split()])[0].recompute
    assert recompute.includes("moe_act") and not recompute.includes("layernorm")
    flags = "--recompute-granularity full --recompute-method block --recompute-num-layers 3"
    assert parse_arguments([*SMALL, *flags.split()])[0].recompute.units(5)[-1] == (range(3, 5), False)


def test_the_checkpoint_decides_about_the_shape() -> None:
    checkpoint = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=100, rotary_base=77.0)
    flags = [*SMALL, "--load", "x", "--use-checkpoint-args", "--num-layers", "9"]
    arguments, remarks = parse_arguments(flags, lambda load: checkpoint)
    assert (arguments.model.num_layers, arguments.model.hidden_size, arguments.model.rotary_base) == (2, 64, 77.0)
    assert remarks == ["--use-checkpoint-args: --num-layers is 2, not 9"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hidden-siz 3", "did you mean --hidden-size"),
        ("--train-iters many", "invalid int value"),
        ("--attention-dropout 0.1", "Dropout is not part of Mixtral"),
        ("--normalization LayerNorm", "only RMSNorm"),
        ("--fp16 --bf16", "contradicts"),
        ("--overlap-param-gather", "needs --use-distributed-optimizer"),
        ("--decoupled-min-lr 1e-5", "needs --decoupled-lr"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction 1.5", "share from 0 to 1, got 1.5"),
        ("--optimizer-cpu-offload --optimizer-offload-fraction nan", "--optimizer-offload-fraction"),
        ("--optimizer-offload-fraction 0.5", "--optimizer-offload-fraction needs --optimizer-cpu-offload"),
        ("--no-pin-cpu-grads", "--no-pin-cpu-grads needs --optimizer-cpu-offload"),
        ("--decoupled-lr 1e-5 --min-lr 1e-4", "--decoupled-min-lr"),
        ("--end-weight-decay 0.1", "need --weight-decay-incr-style"),
        ("--weight-decay-incr-style linear --end-weight-decay 0.1", "needs --start-weight-decay"),
        ("--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler", "not both"),
        ("--min-loss-scale 8 --initial-loss-scale 4", "exceeds --initial-loss-scale"),
        ("--bf16 --params-dtype float32", "contradicts"),
        ("--hidden-size 30 --num-attention-heads 4", r"--hidden-size \(30\) is not divisible by --num-attention-heads"),
        ("--num-attention-heads 32 --num-query-groups 5", "--num-query-groups"),
        ("--tensor-model-parallel-size 3", r"--num-attention-heads \(32\) is not divisible by --tensor-model"),
        ("--num-query-groups 2 --tensor-model-parallel-size 4", "--num-query-groups"),
        ("--num-layers 5 --pipeline-model-parallel-size 2", r"--num-layers \(5\) is not divisible by --pipeline"),
        ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 33", "--seq-length"),
        ("--context-parallel-size 2 --seq-length 34", "not divisible by 2 x --context-parallel-size.*multiple of 4"),
        ("--num-experts 8 --expert-model-parallel-size 3", r"--num-experts \(8\) is not divisible by --expert-model"),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2", "--sequence-parallel"),
        ("--recompute-granularity selective --recompute-modules mlp", "every layer of a Mixtral has experts"),
        ("--recompute-granularity most", "invalid choice"),
        ("--seq-length 99999", "exceeds --max-position-embeddings"),
        ("--moe-router-topk 9", "exceeds --num-experts"),
        ("--train-samples 8", "exactly one of --train-iters and --train-samples"),
        ("--lr-warmup-samples 8", "in the unit of the run"),
        ("--save-interval 5", "needs --save"),
        ("--context-parallel-size 2 --reset-attention-mask", "not supported with --context-parallel-size"),
        ("--use-checkpoint-args", "needs --load"),
        ("--min-lr 1", "--min-lr"),
        ("--micro-batch-size 0", "must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([*SMALL, *flags.split()])


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="give --data-path"):
        parse_arguments("--train-iters 1 --tokenizer-type NullTokenizer --vocab-size 9".split())


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    config = TrainingConfig(train_iters=1, micro_batch_size=2, global_batch_size=10)
    assert config.batches(5).last == 10
    with pytest.raises(ValueError, match=r"not a multiple of --micro-batch-size \(2\) x data-parallel size \(3\) = 6"):
        config.batches(3)


def test_a_choice_that_is_off_by_default() -> None:
    arguments, _ = parse_arguments([*SMALL, "--recompute-granularity", "full", "--recompute-method", "uniform"])
    assert (arguments.recompute.recompute_granularity, arguments.recompute.recompute_method) == ("full", "uniform")
    with pytest.raises(ValueError, match="invalid choice: 'all'"):
        parse_arguments([*SMALL, "--recompute-granularity", "all"])


def test_one_process_does_not_take_the_experts_of_four() -> None:
    model = "--num-experts 8 --mock-data --tokenizer-type NullTokenizer --vocab-size 9 --train-iters 1"
    layout = "--expert-model-parallel-size 4 --micro-batch-size 1 --global-batch-size 4"
    arguments, _ = parse_arguments(f"{model} {layout}".split())
    with pytest.raises(ValueError, match=r"world size 1 is not divisible by .*expert \(4\)"):
        grid_sizes(arguments.parallel, 1)
