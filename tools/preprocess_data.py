#!/usr/bin/env python3
"""Tokenise corpora into Megatron's indexed data sets, `<output-prefix>_<key>_document.bin` and `.idx`.

Reads a JSON object a line, plain or compressed, and Parquet (which files of a folder: docs/data.md). Lines that cannot
be used are left out, counted, and listed in `<output-prefix>_quarantine.jsonl`.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":
    # NumPy would start its own threads when it is loaded; this process is forked, and does no algebra.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"

from megatron.core.atomic_files import error_sentence
from megatron.core.text_files import STREAM_NAMES, terminal_output
from megatron.core.tokenizers import TOKENIZER_TYPES
from tools.preprocessing.engine import BACKENDS
from tools.preprocessing.journal import journal_path
from tools.preprocessing.part import TooManyBad
from tools.preprocessing.pool import WorkerDied
from tools.preprocessing.ranks import Place, part_prefix, place_from
from tools.preprocessing.run import preprocess
from tools.preprocessing.settings import Settings, TokenizerFlags
from tools.run_tool import parsed, tool_parser, usable_cores

EXAMPLES = """examples:
  python tools/preprocess_data.py --input corpus/ --output-prefix encoded/corpus --json-keys text \\
      --tokenizer-type PretrainedTokenizerFromHF --tokenizer-model mixtral/ --append-eod
  torchrun --nproc-per-node 4 tools/preprocess_data.py --workers 16 ...    (or srun; the ranks share the files)
Both write encoded/corpus_text_document.bin, .idx and .json, the same bytes for any number of workers and ranks."""


def available_cores() -> int:
    """Cores that this process may use, shared with the other processes that torchrun or srun started here."""
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(usable_cores() // max(int(sharing) if sharing.isascii() and sharing.isdigit() else 1, 1), 1)


def make_parser() -> argparse.ArgumentParser:
    """The command line, with Megatron's flag names."""
    parser = tool_parser(__doc__, EXAMPLES, allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, metavar="PATH", nargs="+", action="extend",
        help="folders (all below them), files or globs; may be given several times")  # fmt: skip
    add("--output-prefix", required=True, metavar="PREFIX", help="where to write: PREFIX_KEY_document.bin and .idx")
    add("--json-keys", "--json_keys", nargs="+", default=["text"], metavar="KEY",
        help="keys (in Parquet: columns) to take texts from; each becomes a data set (default: text)")  # fmt: skip
    add("--dataset-impl", choices=["mmap"], default="mmap", help="format of the output; mmap is the only one")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="kind of tokenizer")
    add("--tokenizer-model", metavar="PATH",
        help="folder of a Hugging Face tokenizer (or a file in it), or a sentencepiece tokenizer.model")  # fmt: skip
    add("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 tokenizer")
    add("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 tokenizer")
    add("--vocab-size", type=int, metavar="N", help="entries of the vocabulary, for NullTokenizer")
    add("--tokenizer-backend", choices=BACKENDS, default="auto",
        help="library that encodes; auto takes the fastest that gives the tokenizer's own ids")  # fmt: skip
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--append-bos", action="store_true", help="begin each document with the beginning-of-sequence token")
    add("--max-bad-fraction", type=float, default=0.1, metavar="F",
        help="refuse the result if more than this share of the input's bytes on disk is in bad lines, or in files or "
        "ends of files that cannot be read; blank lines do not count (default: 0.1)")  # fmt: skip
    add("--allow-damaged-files", action="store_true",
        help="accept files that ended early or of which nothing could be used, within --max-bad-fraction")  # fmt: skip
    add("--resume", action="store_true", help="go on where an interrupted run of the same command stopped")
    add("--preview", type=int, default=0, metavar="N", help="decode the first N stored documents and show them")
    add("--workers", type=int, default=available_cores(), metavar="N",
        help="processes that tokenise (default: the cores of this machine)")  # fmt: skip
    add("--log-interval", type=int, default=10000, metavar="N", help="documents between lines of progress in a log")
    add("--rank-timeout", type=float, default=60, metavar="SECONDS",
        help="with several ranks, how long one may be silent before it counts as dead (default: 60)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="allow a Hugging Face tokenizer to run the code in its folder")
    return parser


def too_long(prefix: str, keys: list[str]) -> bool:
    """Whether the longest name that is made from the prefix, a temporary one, is longer than file systems take."""
    folder, name = os.path.split(os.path.abspath(prefix))
    longest = len(os.fsencode(f".{name}_rank00000of00000_{max(keys, key=len)}_document.json.xxxxxxxx.tmp"))
    return longest > 255 or len(os.fsencode(folder)) + longest + 1 >= 4096


def parse_arguments(argv: list[str] | None = None) -> tuple[Settings, float]:
    """What the command line asks for, and the rank timeout in seconds."""
    parser = make_parser()
    args = parsed(parser, argv)
    for name in ("workers", "log_interval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error(f"--max-bad-fraction must be between 0 and 1, got {args.max_bad_fraction}")
    if too_long(args.output_prefix, args.json_keys):
        parser.error(
            f"--output-prefix {args.output_prefix[:60]}...: the files' names would be longer than names may be"
        )
    if args.output_prefix.endswith(os.sep) or Path(args.output_prefix).is_dir():
        parser.error(f"--output-prefix {args.output_prefix} is a folder: add the beginning of the files' names")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error(f"--json-keys names a key twice: {' '.join(args.json_keys)}")
    for key in args.json_keys:
        if os.sep in key:
            parser.error(f"--json-keys {key}: the key is part of the output's file names, so it cannot have a {os.sep}")
    values = vars(args)
    tokenizer = TokenizerFlags(**{name: values.pop(name) for name in TokenizerFlags.__dataclass_fields__})
    timeout = values.pop("rank_timeout")
    del values["dataset_impl"]
    return Settings(**values, tokenizer=tokenizer), timeout


def resumable(settings: Settings, place: Place) -> str:
    """What to tell about work that is kept."""
    kept = journal_path(part_prefix(settings.output_prefix, place)).exists()
    return "; what is done is kept: the same command with --resume goes on" if kept else "; nothing was written"


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    settings, timeout = parse_arguments(argv)
    # One thread a process: the workers already use the cores that --workers grants.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with terminal_output():
        return _run(settings, timeout)


def _run(settings: Settings, timeout: float) -> int:
    place = Place()
    try:
        place = place_from(os.environ)
        preprocess(settings, place, timeout)
    except WorkerDied as error:
        advice = f"{resumable(settings, place)}; if memory is short, use fewer --workers"
        print(f"{place.label}error: {error}{advice}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        failed_write = isinstance(error, OSError) and error.errno is not None and not error.filename
        prefix = f"cannot write {settings.output_prefix}: " if failed_write else ""
        of_files = isinstance(error, OSError) and error.filename not in STREAM_NAMES
        advice = resumable(settings, place) if of_files and not isinstance(error, TooManyBad) else ""
        print(f"{place.label}error: {prefix}{error_sentence(error)}{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{place.label}error: interrupted{resumable(settings, place)}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
