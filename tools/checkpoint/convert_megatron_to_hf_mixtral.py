"""Converts a Mixtral checkpoint of Megatron's format, converted or trained, to a folder that transformers loads.

Example:
  PYTHONPATH=$(pwd) python tools/checkpoint/convert_megatron_to_hf_mixtral.py --megatron-checkpoint-path megatron \\
      --huggingface-config-path Mixtral-8x7B-v0.1 --huggingface-checkpoint-path trained-hf \\
      --tensor-parallel-size 4 --pipeline-parallel-size 2

The config and the output may be the same folder: its weights are replaced once the new ones are complete. A model that
was trained from scratch has no such folder: without --huggingface-config-path, or with one that has a tokenizer only,
config.json is made from the checkpoint's own arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.checkpoint.loader_mixtral import add_arguments as add_source_arguments
from tools.checkpoint.loader_mixtral import open_megatron
from tools.checkpoint.saver_mixtral_hf import Export
from tools.checkpoint.stream import byte_size
from tools.checkpoint.util import add_common_arguments, convert, run_conversion
from tools.run_tool import parsed, positive


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatron-checkpoint-path", required=True, help="folder with the tracker file, or a step's own folder"
    )
    parser.add_argument(
        "--huggingface-config-path",
        help="model folder with config.json and the tokenizer files; config.json may be missing, and is then made from "
        "the checkpoint (default: that, with the tokenizer folder the checkpoint names)",
    )
    parser.add_argument("--huggingface-checkpoint-path", required=True, help="folder to write")
    parser.add_argument(
        "--tensor-parallel-size",
        type=positive,
        help="tensor-parallel size the checkpoint was saved at; another one is refused (default: as found)",
    )
    parser.add_argument(
        "--pipeline-parallel-size",
        type=positive,
        help="pipeline stages the checkpoint was saved at; another one is refused (default: as found)",
    )
    parser.add_argument(
        "--expert-parallel-size",
        type=positive,
        help="expert-parallel size the checkpoint was saved at; another one is refused (default: as found)",
    )
    add_source_arguments(parser)
    parser.add_argument("--max-shard-size", type=byte_size, default="5GB", help="largest weight file (default: 5GB)")
    add_common_arguments(parser)
    return parser


def _convert(args: argparse.Namespace) -> None:
    folder = Path(args.megatron_checkpoint_path)
    config_folder = None if args.huggingface_config_path is None else Path(args.huggingface_config_path)
    export = Export(config_folder, Path(args.huggingface_checkpoint_path), folder)
    source = open_megatron(
        folder,
        iteration=args.iteration,
        true_vocab_size=args.true_vocab_size,
        fallback_vocab_size=export.vocab_size,
        params_dtype=args.params_dtype,
        layout=(args.tensor_parallel_size, args.pipeline_parallel_size, args.expert_parallel_size),
    )
    convert(source, lambda checked: export.write(checked, args.max_shard_size), args.dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    args = parsed(build_parser(), argv)
    return run_conversion(lambda: _convert(args))


if __name__ == "__main__":
    sys.exit(main())
