"""Command-line flags, generated from the configuration dataclasses, plus those that Megatron-LM scripts also pass."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn

from megatron.core.config import ModelConfig
from megatron.core.fusions.stored import LARGEST_BETA
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.training.compatibility import (
    COMPATIBILITY_FLAGS,
    check_compatibility,
    take_expert_width,
    with_values_of_ours,
)
from megatron.training.config import Arguments

SECTIONS: dict[str, type] = typing.get_type_hints(Arguments)
"""The groups of flags, each a dataclass."""

# Fields that describe the weights themselves, which --use-checkpoint-args takes from the checkpoint.
SHAPE_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "max_position_embeddings", "rotary_base", "norm_epsilon", "vocab_size", "num_experts", "moe_router_topk",
)  # fmt: skip

_EXAMPLE = """example:
  torchrun --nproc-per-node 8 pretrain_gpt.py --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 \\
      --sequence-parallel --bf16 --load checkpoints --save checkpoints --use-checkpoint-args --seq-length 4096 \\
      --tokenizer-model mixtral --data-path 0.6 a_text_document 0.4 b_text_document --train-iters 1000
mixtral_4x7b_example.sh starts it with all settings of a Mixtral 4x7B."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def field_help(config_class: type) -> dict[str, str]:
    """The sentence under each field of a configuration dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    sentences = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant)
            sentences[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return sentences


def build_parser() -> argparse.ArgumentParser:
    """The parser of `pretrain_gpt.py`; only flags that were given end up in its result."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        usage="torchrun --nproc-per-node N pretrain_gpt.py FLAGS",
        description="Pre-train a Mixtral model.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for section, config_class in SECTIONS.items():
        group = parser.add_argument_group(section, config_class.__doc__)
        sentences = field_help(config_class)
        for field in dataclasses.fields(config_class):
            _add_field(group, field, typing.get_type_hints(config_class)[field.name], sentences[field.name])
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16 with float32 masters and gradients.")
    parser.add_argument("--fp16", action="store_true", help="Train in float16 with a loss scale and float32 masters.")
    group = parser.add_argument_group(
        "compatibility", "Flags of Megatron-LM scripts that are always on here, have no effect, or allow one value."
    )
    group.add_argument("--moe-ffn-hidden-size", type=int, help="Inner width of one expert, as --ffn-hidden-size.")
    for name, flag in COMPATIBILITY_FLAGS.items():
        if flag.values:
            nargs = "*" if flag.values == "many" else None
            group.add_argument(f"--{name}", nargs=nargs, help=flag.help, metavar="VALUE")
        else:
            group.add_argument(f"--{name}", action="store_true", help=flag.help)
    return parser


def _add_field(group: Any, field: dataclasses.Field, hint: Any, sentence: str) -> None:
    flag = "--" + field.name.replace("_", "-")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # a literal or None is the latter before Python 3.14
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        assert field.default is False, f"{field.name}: a flag without a value must be off by default"
        group.add_argument(flag, action="store_true", help=sentence)
        return
    if field.default not in (None, ()):
        sentence = f"{sentence} (default: {field.default})"
    sentence = sentence.replace("%", "%%")
    if typing.get_origin(hint) is Literal:
        group.add_argument(flag, choices=typing.get_args(hint), help=sentence)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(flag, nargs="*", type=typing.get_args(hint)[0], help=sentence)
    else:
        group.add_argument(flag, type=hint, help=sentence)


def parse_arguments(
    argv: Sequence[str], checkpoint_model: Callable[[str], ModelConfig] | None = None
) -> tuple[Arguments, list[str]]:
    """Parses and checks the command line; returns the arguments and remarks to print once.

    `checkpoint_model` reads the model's shape from a checkpoint folder, for --use-checkpoint-args.
    Raises ValueError for unknown flags, bad values and values that do not fit together.
    """
    parser = build_parser()
    # flags may be spelled with underscores, as in --json_keys
    parts = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in argv]
    normal = [flag.replace("_", "-") + equals + value for flag, equals, value in parts]
    normal, remarks = with_values_of_ours(normal)
    namespace, unknown = parser.parse_known_args(normal)
    if unknown:
        raise ValueError(_unknown_flags(unknown, parser))
    given = vars(namespace)
    if "group_query_attention" in given and "num_query_groups" not in given and "use_checkpoint_args" not in given:
        raise ValueError("--group-query-attention needs --num-query-groups, the number of key/value heads")
    remarks += check_compatibility(given)
    take_expert_width(given)
    for flag, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if given.pop(flag, False) and given.setdefault("params_dtype", dtype) != dtype:
            raise ValueError(f"--{flag} contradicts --params-dtype {given['params_dtype']} (or --bf16 and --fp16 both)")
    if given.get("use_checkpoint_args") and given.get("load") and checkpoint_model is not None:
        remarks += _take_shape(given, checkpoint_model(given["load"]))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    sections = {}
    for section, config_class in SECTIONS.items():
        names = {field.name for field in dataclasses.fields(config_class)}
        sections[section] = config_class(**{name: value for name, value in given.items() if name in names})
    arguments = Arguments(**sections)
    _check_together(arguments)
    return arguments, remarks + _slow_averages(arguments.optimizer)


def _unknown_flags(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    hints = []
    for argument in unknown:
        close = difflib.get_close_matches(argument, known, n=1, cutoff=0.8)
        hints.append(argument + (f" (did you mean {close[0]}?)" if close else ""))
    return f"unknown arguments: {', '.join(hints)}"


def _take_shape(given: dict[str, Any], checkpoint: ModelConfig) -> list[str]:
    """Overwrites the shape in `given` by the checkpoint's; returns a remark for every value that changes."""
    remarks = []
    for name in SHAPE_FIELDS:
        value = getattr(checkpoint, name)
        if value is None:  # the checkpoint does not know it
            continue
        if name in given and given[name] != value:
            remarks.append(f"--use-checkpoint-args: --{name.replace('_', '-')} is {value}, not {given[name]}")
        given[name] = value
    return remarks


def _check_precision(arguments: Arguments) -> None:
    """Raises ValueError if the weights' type does not go with what the optimizer keeps."""
    optimizer, dtype = arguments.optimizer, arguments.model.params_dtype
    for name in ("main_params_dtype", "main_grads_dtype"):
        if getattr(optimizer, name) != "fp32" and dtype != "bfloat16":
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(optimizer, name)} is for weights in bfloat16, these are in "
                f"{dtype}: add --bf16 or leave it at fp32"
            )
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(optimizer, name) != "fp32" and dtype == "float64":
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(optimizer, name)} is for weights in 16 bits or float32, these "
                "are in float64: leave it at fp32"
            )


def _slow_averages(optimizer: OptimizerConfig) -> list[str]:
    """A remark on every moment that changes less in a step than its type can show."""
    remarks = []
    for moment, beta, kind in (
        ("exp-avg", optimizer.adam_beta1, optimizer.exp_avg_dtype),
        ("exp-avg-sq", optimizer.adam_beta2, optimizer.exp_avg_sq_dtype),
    ):
        most = LARGEST_BETA.get(kind, 1.0)
        if beta > most:
            remarks.append(
                f"--{moment}-dtype {kind} rounds away a decay of {beta}, so that this average cannot fall: "
                f"take a beta of at most {most:g}, or a wider type (docs/optimizer.md)"
            )
    return remarks


def _check_together(arguments: Arguments) -> None:
    """Checks that need more than one section. Raises ValueError."""
    model, data = arguments.model, arguments.data
    arguments.parallel.check_model(model, data.seq_length)
    if data.seq_length > model.max_position_embeddings:
        raise ValueError(
            f"--seq-length ({data.seq_length}) exceeds --max-position-embeddings ({model.max_position_embeddings})"
        )
    dry_run = arguments.training.dry_run is not None
    if not (data.is_given or dry_run):
        raise ValueError(
            "nothing to train on: give --data-path, --train-data-path or --data-args-path (or --mock-data for "
            "generated tokens)"
        )
    if arguments.parallel.context_parallel_size > 1 and (data.reset_attention_mask or data.reset_position_ids):
        raise ValueError(
            "--reset-attention-mask and --reset-position-ids are not supported with --context-parallel-size above 1: "
            "remove them or leave the context-parallel size at 1"
        )
    if not dry_run and arguments.tokenizer.tokenizer_type == "NullTokenizer" and model.vocab_size is None:
        raise ValueError("NullTokenizer needs --vocab-size")
    optimizer, samples_run = arguments.optimizer, arguments.training.train_samples is not None
    if optimizer.lr_warmup_fraction is not None and (optimizer.lr_warmup_iters or optimizer.lr_warmup_samples):
        raise ValueError("give --lr-warmup-fraction or --lr-warmup-iters/--lr-warmup-samples, not both")
    _check_precision(arguments)
    iterations = optimizer.lr_decay_iters or optimizer.lr_warmup_iters or optimizer.lr_wsd_decay_iters
    samples = optimizer.lr_decay_samples or optimizer.lr_warmup_samples or optimizer.lr_wsd_decay_samples
    if (samples_run and iterations) or (not samples_run and samples):
        raise ValueError(
            "give the schedule in the unit of the run: --lr-decay-iters, --lr-warmup-iters and --lr-wsd-decay-iters "
            "with --train-iters, --lr-decay-samples, --lr-warmup-samples and --lr-wsd-decay-samples with "
            "--train-samples"
        )
    if arguments.checkpoint.save_interval and not arguments.checkpoint.save:
        raise ValueError("--save-interval needs --save")
