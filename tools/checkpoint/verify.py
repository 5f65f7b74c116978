"""Compares a Megatron checkpoint with the Hugging Face model it was converted from, or to.

Example:
  PYTHONPATH=$(pwd) python tools/checkpoint/verify.py --huggingface-path Mixtral-8x7B-v0.1 --megatron-path m --logits

Every weight is compared bit for bit, some rows at a time. With --logits both models also run on the same tokens on the
CPU, in float32: transformers in one process, ours in one process a rank of the checkpoint's layout. The largest
difference of the logits is reported, or the first layer whose output differs by more than --tolerance, and by how much.
The folder may hold a dense Mistral that the checkpoint was made from; the router has no counterpart then.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.interchange.element_types import cast
from megatron.core.interchange.stored_tensor import bytes_of
from megatron.core.models.mixtral.hf_config import check_config_matches
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from tools.checkpoint.loader_mistral_hf import UpcycledSource
from tools.checkpoint.loader_mixtral import PerRankSource, open_megatron, step
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource
from tools.checkpoint.model_folder import read_config
from tools.checkpoint.stream import Progress, Source, in_threads, model_bytes, rows_at_a_time, verify_source
from tools.checkpoint.util import run_conversion
from tools.checkpoint.verify_logits import Comparison, compare_logits, compared_length
from tools.run_tool import parsed, positive


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--huggingface-path", required=True, help="model folder: weights and config.json")
    parser.add_argument("--megatron-path", required=True, help="folder with the tracker file, or a step's own folder")
    parser.add_argument("--iteration", type=step, help="step to compare instead of the newest: a number, or release")
    parser.add_argument("--logits", action="store_true", help="run both models as well")
    parser.add_argument(
        "--tokens",
        type=positive,
        default=64,
        help="length of the two sequences of --logits, at most the model's sliding window (default: 64)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest ||ours - theirs|| / ||theirs|| of a layer's output and of the logits (default: 1e-4)",
    )
    return parser


def compare_weights(theirs: Source, ours: Source) -> list[str]:
    """What differs, a sentence for each weight, after every element of every weight was compared."""
    model, dtype = ours.description.model, ours.description.dtype
    progress = Progress("comparing", model_bytes(model, dtype))
    differences: dict[str, str] = {}

    def compare(rule: WeightRule) -> None:
        different, largest = 0, 0.0
        for rows in rule.chunks(1, rows_at_a_time(rule, dtype)):
            first, second = cast(theirs.read(rule, rows), theirs.description.dtype, dtype), ours.read(rule, rows)
            progress.advance(second.nbytes)
            if not np.array_equal(bytes_of(first), bytes_of(second)):
                left, right = (cast(array, dtype, "float64") for array in (first, second))
                different += int((left != right).sum()) or 1
                largest = max(largest, float(np.abs(left - right).max()))
        if different:
            differences[rule.name] = f"{rule.name}: {different} elements differ, by {largest:.3e} at most"

    rules = [
        rule
        for rule in mixtral_weights(model)
        if not (isinstance(theirs, UpcycledSource) and rule.name.endswith(".router.weight"))
    ]
    in_threads(compare, rules)
    return [differences[rule.name] for rule in rules if rule.name in differences]


def verify(args: argparse.Namespace) -> None:
    """Compares, prints what was found, and raises ValueError if the two models are not the same."""
    folder = Path(args.huggingface_path)
    config = read_config(folder)
    vocab_size = config.get("vocab_size")
    ours = open_megatron(
        Path(args.megatron_path),
        iteration=args.iteration,
        fallback_vocab_size=vocab_size if isinstance(vocab_size, int) else None,
    )
    model = ours.description.model
    theirs: HuggingFaceSource
    if config.get("model_type") == "mistral":
        theirs = UpcycledSource(folder, model.num_experts, model.moe_router_topk)
    else:
        theirs = HuggingFaceSource(folder)
    check_config_matches(model, {**config, **theirs.description.config_changes})
    if theirs.description.dtype != ours.description.dtype:
        there, here = theirs.description.dtype, ours.description.dtype
        print(f"note: types differ, {there} there and {here} here: compared as the latter")
    verify_source(ours)
    differences = compare_weights(theirs, ours)
    print(f"weights: {'equal bit for bit' if not differences else f'{len(differences)} differ'}")
    for difference in differences[:10]:
        print(f"  {difference}")
    comparison = Comparison()
    if args.logits:
        if not isinstance(ours, PerRankSource):
            raise ValueError(
                f"{args.megatron_path} has no layout to run at: convert it with --loader mixtral --saver mixtral first"
            )
        window = config.get("sliding_window")
        length = compared_length(args.tokens, window, ours.layout.tensor)
        if length < args.tokens:
            print(f"note: {length} tokens are compared: training does not go beyond the sliding window of {window}")
        comparison = compare_logits(folder, ours, length, args.tolerance)
    if comparison.text:
        print(comparison.text)
    if differences or not comparison.equal:
        what = ", ".join(["weights"] * bool(differences) + ["logits"] * (not comparison.equal))
        raise ValueError(f"{args.megatron_path} and {folder} are not the same model: {what} differ")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    args = parsed(build_parser(), argv)
    return run_conversion(lambda: verify(args))


if __name__ == "__main__":
    sys.exit(main())
