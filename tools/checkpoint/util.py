"""Converts a checkpoint from one format or parallel layout to another, one weight at a time.

Example:
  PYTHONPATH=$(pwd) python tools/checkpoint/util.py --model-type GPT --loader mixtral_hf --saver mixtral \\
      --load-dir Mixtral-8x7B-v0.1 --save-dir megatron --tokenizer-model Mixtral-8x7B-v0.1/tokenizer.model \\
      --target-tensor-parallel-size 4 --target-pipeline-parallel-size 2

With --loader and --saver before it, --help lists their flags too.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.atomic_files import error_sentence
from megatron.core.interchange.element_types import STORED_AS
from tools.checkpoint.expert_selection import SelectedExperts, chosen_experts
from tools.checkpoint.stream import CheckedSource, Progress, Source, model_bytes
from tools.run_tool import parsed, run_tool

_SHOWN_IN_HELP = {"loader": "mixtral_hf", "saver": "mixtral"}


def find_plugin(kind: str, name: str) -> ModuleType:
    """The module `loader_NAME` or `saver_NAME`: one of ours, or else one on the Python path.

    Raises ValueError if there is none.
    """
    if not name.isidentifier():
        raise ValueError(f"--{kind} {name!r} is not the name of a plugin")
    for module in (f"tools.checkpoint.{kind}_{name}", f"{kind}_{name}"):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    ours = sorted(path.stem.removeprefix(f"{kind}_") for path in Path(__file__).parent.glob(f"{kind}_*.py"))
    raise ValueError(
        f"no {kind} {name!r}: it would be a file {kind}_{name}.py on the Python path; ours are {', '.join(ours)}"
    )


def convert(source: Source, write: Callable[[CheckedSource], None], dry_run: bool = False) -> None:
    """Gives `source` to the function that writes, with a progress line, and checks that all of it was read."""
    description = source.description
    total = model_bytes(description.model, description.dtype)
    checked = CheckedSource(source, Progress("converting", total), dry_run)
    write(checked)
    if dry_run:
        checked.verify()
    else:
        checked.check_complete()


def run_conversion(action: Callable[[], object]) -> int:
    """Exit code of a tool that writes a checkpoint or nothing."""
    return run_tool(
        action,
        interrupted="interrupted, nothing was written",
        sentence=lambda error: " ".join(error_sentence(error).split()),
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --params-dtype and --dry-run."""
    parser.add_argument("--params-dtype", choices=tuple(STORED_AS), help="type to write (default: the source's)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing: print every weight with where it comes from and goes to, and the disk that is needed",
    )


def build_parser(loader: ModuleType, saver: ModuleType) -> argparse.ArgumentParser:
    """The command line, with the flags of the chosen loader and saver."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", choices=("GPT",), default="GPT", help="family of the model")
    parser.add_argument("--loader", required=True, help="format to read: mixtral_hf, mixtral or mistral_hf")
    parser.add_argument("--saver", required=True, help="format to write: mixtral, mixtral_hf or mixtral_torch_dist")
    parser.add_argument("--load-dir", required=True, help="folder to read")
    parser.add_argument("--save-dir", required=True, help="folder to write, new or empty, apart from --load-dir")
    parser.add_argument(
        "--keep-experts",
        metavar="LIST",
        help="keep these experts of every layer, such as 0,2,5,7, or best:4: the four with most tokens in each layer",
    )
    parser.add_argument(
        "--routing-stats",
        metavar="FILE",
        help="tokens of each expert, for best:N; training writes it",
    )
    add_common_arguments(parser)
    for kind, plugin in (("loader", loader), ("saver", saver)):
        plugin.add_arguments(parser.add_argument_group(f"of the {kind} {plugin.__name__.rpartition('.')[2]}"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument("--loader")
    names.add_argument("--saver")
    chosen, _ = names.parse_known_args(argv)
    plugins: list[ModuleType] = []
    for kind in ("loader", "saver"):
        name = getattr(chosen, kind) or _SHOWN_IN_HELP[kind]
        try:
            plugins.append(find_plugin(kind, name))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    args = parsed(build_parser(*plugins), argv)
    loader, saver = plugins
    return run_conversion(lambda: _convert(loader, saver, args))


def _convert(loader: ModuleType, saver: ModuleType, args: argparse.Namespace) -> None:
    if hasattr(saver, "check"):
        saver.check(args)
    convert(_open(loader, args), lambda source: saver.save(source, args), args.dry_run)


def _open(loader: ModuleType, args: argparse.Namespace) -> Source:
    source: Source = loader.open_source(args)
    if args.keep_experts is None:
        if args.routing_stats is not None:
            raise ValueError("--routing-stats goes with --keep-experts best:N only")
        return source
    model = source.description.model
    statistics = None if args.routing_stats is None else Path(args.routing_stats)
    return SelectedExperts(source, chosen_experts(args.keep_experts, statistics, model.num_layers, model.num_experts))


if __name__ == "__main__":
    sys.exit(main())
