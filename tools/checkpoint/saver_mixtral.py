"""Saver: a Mixtral checkpoint in Megatron's format, one file a rank, written one file at a time."""

import argparse
import contextlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from megatron.core.atomic_files import exclusive_folder
from megatron.core.config import ParallelConfig
from megatron.core.interchange import (
    CHECKPOINT_FILE,
    CHECKPOINT_VERSION,
    Layout,
    begin_step,
    commit_step,
    model_args_namespace,
    rank_dir_name,
    save_torch,
)
from megatron.core.interchange.layout import abandon_step
from megatron.core.models.mixtral.hf_weights import stage_weights
from tools.checkpoint.stream import CheckedSource, Description, Source

TOKENIZER_TYPES = ("PretrainedTokenizerFromHF", "Llama2Tokenizer", "GPT2BPETokenizer", "NullTokenizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The layout to write, and the tokenizer to name in the checkpoint."""
    parser.add_argument("--target-tensor-parallel-size", type=int, default=1, help="tensor-parallel ranks to write for")
    parser.add_argument("--target-pipeline-parallel-size", type=int, default=1, help="pipeline stages to write for")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        help="pad the vocabulary to a multiple of this times the tensor-parallel size (default: the source's, or 128)",
    )
    parser.add_argument(
        "--tokenizer-model", help="tokenizer folder or file to name in the checkpoint (default: the source's)"
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="kind of tokenizer (default: by the files: tokenizer.json, or else a sentencepiece tokenizer.model)",
    )


def find_tokenizer(model: str | None, kind: str | None) -> tuple[str | None, str | None]:
    """Type and place of a tokenizer from a folder or file; a folder with tokenizer.json is a Hugging Face tokenizer.

    With only a tokenizer.model it is read by sentencepiece, which is what the model was trained with. Raises
    FileNotFoundError if there is none.
    """
    if model is None or kind == "NullTokenizer":
        return kind, model
    path = Path(model).absolute()
    folder = path if path.is_dir() else path.parent
    if not path.exists() and not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"no tokenizer {model}: give a folder with tokenizer.json, or a tokenizer.model file")
    if kind is not None and path.exists():
        return kind, str(path)
    if (folder / "tokenizer.json").is_file():
        return "PretrainedTokenizerFromHF", str(folder)
    if path.is_dir() and (path / "tokenizer.model").is_file():
        return "Llama2Tokenizer", str(path / "tokenizer.model")
    return ("Llama2Tokenizer" if path.suffix == ".model" else "PretrainedTokenizerFromHF"), str(path)


def save(source: CheckedSource, args: argparse.Namespace) -> None:
    """Writes the source's weights to `args.save_dir`/release; nothing is left of a failed attempt.

    Raises ValueError if the model does not divide over the layout or the folder is not empty.
    """
    description, root = source.description, Path(args.save_dir)
    tp, pp = args.target_tensor_parallel_size, args.target_pipeline_parallel_size
    model = description.model
    if args.make_vocab_size_divisible_by is not None:
        model = replace(model, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by)
    layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    try:
        layout.check_model(model, description.seq_length)
    except ValueError as error:
        raise ValueError(re.sub("--(tensor|pipeline)-model", r"--target-\1", str(error))) from None
    if args.tokenizer_model is not None or args.tokenizer_type is not None or description.tokenizer_type is None:
        model_path = args.tokenizer_model or description.tokenizer_model
        tokenizer = find_tokenizer(model_path, args.tokenizer_type)
    else:
        tokenizer = (description.tokenizer_type, description.tokenizer_model)
    if description.sliding_window is not None:
        print(
            f"note: the model attends to {description.sliding_window} tokens at most; train with a --seq-length that "
            "is not longer",
            file=sys.stderr,
        )
    existed = root.exists()
    if existed and (not root.is_dir() or any(entry.name != ".release.saving" for entry in root.iterdir())):
        raise ValueError(f"{root} is not an empty folder: choose another --save-dir or remove what is in it")
    namespace = model_args_namespace(model, Layout(tp, pp), description.seq_length, _extra_args(description, tokenizer))
    with exclusive_folder(begin_step(root, "release")):
        try:
            _write_ranks(source, root, namespace, model.padded_vocab_size(tp))
            source.check_complete()
            commit_step(root, "release", Layout(tp, pp))
        except BaseException:
            abandon_step(root, "release")
            if not existed:
                with contextlib.suppress(OSError):  # only if nothing else has come into it
                    root.rmdir()
            raise
    dtype = str(description.dtype).removeprefix("torch.")
    print(f"wrote {root / 'release'}: tensor x pipeline = {tp} x {pp}, {dtype}, weights only")


def _extra_args(description: Description, tokenizer: tuple[str | None, str | None]) -> dict[str, object]:
    return {
        "tokenizer_type": tokenizer[0],
        "tokenizer_model": tokenizer[1],
        "sliding_window": description.sliding_window,
        "params_dtype": str(description.dtype).removeprefix("torch."),
        "fp16": description.dtype == torch.float16,
    }


def _write_ranks(source: Source, root: Path, args: argparse.Namespace, padded_vocab_size: int) -> None:
    folder = begin_step(root, "release")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    for stage in range(pp):
        rules = list(stage_weights(source.description.model, stage, pp, padded_vocab_size))
        for rank in range(tp):
            path = folder / rank_dir_name(rank, stage, pp) / CHECKPOINT_FILE
            path.parent.mkdir(exist_ok=True)
            weights = {name: source.read(rule, rank, tp) for name, rule in rules}
            save_torch(
                path,
                {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": 0, "model": weights},
            )
