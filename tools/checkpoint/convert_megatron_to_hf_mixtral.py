"""Converts a Mixtral checkpoint of Megatron's format, converted or trained, to a folder that transformers loads.

Example:
  PYTHONPATH=$(pwd) python tools/checkpoint/convert_megatron_to_hf_mixtral.py --megatron-checkpoint-path megatron \\
      --huggingface-config-path Mixtral-8x7B-v0.1 --huggingface-checkpoint-path trained-hf \\
      --tensor-parallel-size 4 --pipeline-parallel-size 2

The config and the output may be the same folder: its weights are replaced once the new ones are complete.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.checkpoint.loader_mixtral import open_megatron, step
from tools.checkpoint.model_folder import read_config
from tools.checkpoint.saver_mixtral_hf import Export
from tools.checkpoint.stream import byte_size
from tools.checkpoint.util import add_common_arguments, convert, run_conversion


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megatron-checkpoint-path", required=True, help="folder with the tracker file, or a step's own folder"
    )
    parser.add_argument(
        "--huggingface-config-path", required=True, help="model folder with config.json and the tokenizer files"
    )
    parser.add_argument("--huggingface-checkpoint-path", required=True, help="folder to write")
    parser.add_argument(
        "--tensor-parallel-size", type=int, help="tensor-parallel size of the checkpoint (default: as found)"
    )
    parser.add_argument(
        "--pipeline-parallel-size", type=int, help="pipeline stages of the checkpoint (default: as found)"
    )
    parser.add_argument(
        "--expert-parallel-size", type=int, help="expert-parallel size of the checkpoint (default: as found)"
    )
    parser.add_argument("--iteration", type=step, help="step to convert instead of the newest: a number, or release")
    parser.add_argument("--max-shard-size", type=byte_size, default="5GB", help="largest weight file (default: 5GB)")
    add_common_arguments(parser)
    return parser


def _convert(args: argparse.Namespace) -> None:
    config_folder, folder = Path(args.huggingface_config_path), Path(args.megatron_checkpoint_path)
    export = Export(config_folder, Path(args.huggingface_checkpoint_path), folder)
    vocab_size = read_config(config_folder).get("vocab_size")
    source = open_megatron(
        folder,
        iteration=args.iteration,
        fallback_vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        params_dtype=args.params_dtype,
        layout=(args.tensor_parallel_size, args.pipeline_parallel_size, args.expert_parallel_size),
    )
    convert(source, lambda checked: export.write(checked, args.max_shard_size), args.dry_run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    args = build_parser().parse_args(argv)
    return run_conversion(lambda: _convert(args))


if __name__ == "__main__":
    sys.exit(main())
