#!/usr/bin/env python3
"""Look at indexed data sets, check them, decode their documents, and build training indices ahead."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.atomic_files import error_sentence
from megatron.core.config import TokenizerConfig
from megatron.core.datasets.blended_dataset import blend_summary, build_train_valid_test_datasets, source_table
from megatron.core.datasets.description import DatasetDescription, description_path, file_sha256, read_description
from megatron.core.datasets.indexed_dataset import IndexedDataset, data_set_prefix
from megatron.core.tokenizers import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from tools.run_tool import parsed, run_tool, tool_parser

BLOCK_TOKENS, BLOCK_DOCUMENTS = 1 << 23, 1 << 20
SECONDS_BETWEEN_LINES = 10
EXAMPLE = """examples (a DATASET is the path of a .bin and .idx without these suffixes):
  python tools/data.py info encoded/corpus_text_document
  python tools/data.py verify encoded/*_document.idx
  python tools/data.py show encoded/corpus_text_document 3 --tokenizer-model mixtral/
  python tools/data.py build-index --data-path 0.6 encoded/a_text_document 0.4 encoded/b_text_document \\
      --seq-length 4096 --train-iters 100000 --global-batch-size 256 --data-cache-path cache/"""


def unique_prefixes(datasets: Sequence[str]) -> list[str]:
    """Each data set once, though a glob may name several of its files."""
    return list(dict.fromkeys(map(data_set_prefix, datasets)))


def info(args: argparse.Namespace) -> None:
    """Prints what a data set's index and description say."""
    for prefix in unique_prefixes(args.datasets):
        indexed = IndexedDataset(prefix)
        lengths = indexed.document_lengths(0, indexed.document_count)
        print(f"{prefix}")
        print(f"  documents   {indexed.document_count:,} in {len(indexed):,} sequences")
        print(f"  tokens      {indexed.token_count:,} of type {indexed.dtype.name}")
        if len(lengths):
            shares = np.percentile(lengths, (0, 10, 50, 90, 100)).round().astype(int)
            print("  a document  " + " ... ".join(f"{n:,}" for n in shares) + " tokens (least, 10%, median, 90%, most)")
        description = read_description(prefix)
        if description is None:
            print(f"  tokenizer   unknown: there is no {description_path(prefix)}")
            continue
        tokenizer = description.tokenizer
        print(f"  tokenizer   {tokenizer.get('type')}, vocabulary {tokenizer.get('vocab_size')}, "
              f"EOD {tokenizer.get('eod')}, BOS {tokenizer.get('bos')}")  # fmt: skip
        for name, digest in tokenizer.get("sha256", {}).items():
            print(f"              {name} {digest}")
        added = [name for name, there in (("BOS", description.append_bos), ("EOD", description.append_eod)) if there]
        print(f"  added       {' and '.join(added) or 'nothing'} to each document; text from key {description.key}")


class Progress:
    """A line every ten seconds of a long check."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._start = what, total, time.monotonic()
        self._next = self._start + SECONDS_BETWEEN_LINES

    def show(self, done: int) -> None:
        """Tells how much is done, if it is time to."""
        now = time.monotonic()
        if now >= self._next:
            left = (now - self._start) * (self._total - done) / max(done, 1)
            print(f"{self._what}: {done / self._total:.0%}, {left:.0f} s left", file=sys.stderr, flush=True)
            self._next = now + SECONDS_BETWEEN_LINES


def document_of_token(indexed: IndexedDataset, token: int) -> int:
    """The document that holds token number `token` of all."""
    ends = np.cumsum(indexed.document_lengths(0, indexed.document_count), dtype=np.int64)
    return int(np.searchsorted(ends, token, side="right"))


def document_not_ending_with(indexed: IndexedDataset, token: int) -> int | None:
    """The first document with tokens whose last one is not `token`, if there is one."""
    begin = 0
    for start in range(0, indexed.document_count, BLOCK_DOCUMENTS):
        lengths = indexed.document_lengths(start, min(start + BLOCK_DOCUMENTS, indexed.document_count))
        ends = begin + np.cumsum(lengths, dtype=np.int64)
        last = indexed.tokens(0, indexed.token_count)[np.maximum(ends - 1, 0)]
        wrong = np.flatnonzero((lengths > 0) & (last != token))
        if len(wrong):
            return start + int(wrong[0])
        begin = int(ends[-1])
    return None


def check_tokens(indexed: IndexedDataset, vocab_size: int | None) -> None:
    """Raises ValueError, naming a document, if a token is negative or not below `vocab_size`."""
    if indexed.dtype.kind not in "iu":
        raise ValueError(f"{indexed.prefix}.idx: tokens of type {indexed.dtype.name} cannot be trained on")
    limit = np.iinfo(indexed.dtype).max + 1 if vocab_size is None else vocab_size
    progress = Progress(f"{indexed.prefix}.bin: token ids", indexed.token_count)
    for start in range(0, indexed.token_count, BLOCK_TOKENS):
        block = indexed.tokens(start, min(start + BLOCK_TOKENS, indexed.token_count))
        if block.min() < 0 or block.max() >= limit:
            place = int(np.flatnonzero((block < 0) | (block >= limit))[0])
            raise ValueError(
                f"{indexed.prefix}.bin: document {document_of_token(indexed, start + place)} has the token id "
                f"{block[place]}, outside the vocabulary of {limit}: it was made with another tokenizer"
            )
        progress.show(start + len(block))


def check_description(indexed: IndexedDataset, description: DatasetDescription) -> None:
    """Raises ValueError if checksums, counts or the tokens that end documents are not those of the description."""
    path = description_path(indexed.prefix)
    found = (indexed.document_count, indexed.token_count, indexed.dtype.name)
    if found != (description.documents, description.tokens, description.dtype):
        raise ValueError(
            f"{path} describes {description.documents} documents of {description.tokens} {description.dtype} tokens, "
            f"but the data set has {found[0]} of {found[1]} {found[2]}"
        )
    for suffix in ("idx", "bin"):
        if file_sha256(f"{indexed.prefix}.{suffix}") != description.sha256.get(suffix):
            raise ValueError(
                f"{indexed.prefix}.{suffix} has a different SHA-256 than {path} states: it has changed since"
            )
    eod = description.tokenizer.get("eod")
    if description.append_eod and eod is not None:
        without = document_not_ending_with(indexed, eod)
        if without is not None:
            raise ValueError(f"{indexed.prefix}.bin: document {without} does not end with {eod}, as {path} states")


def verify(args: argparse.Namespace) -> None:
    """Checks structure, checksums and token ids of each data set. Raises ValueError if one is bad."""
    bad = 0
    for prefix in unique_prefixes(args.datasets):
        try:
            indexed, description = IndexedDataset(prefix), read_description(prefix)
            vocab_size = args.vocab_size
            if description is not None:
                check_description(indexed, description)
                vocab_size = vocab_size or description.tokenizer.get("vocab_size")
            check_tokens(indexed, vocab_size)
        except (ValueError, OSError) as error:
            print(f"{prefix}: bad: {error_sentence(error)}", flush=True)
            bad += 1
            continue
        checked = "structure" if description is None else "structure, checksums"
        ids = f"token ids below {vocab_size:,}" if vocab_size else "token ids not negative"
        print(f"{prefix}: good: {checked} and {ids}; {indexed.document_count:,} documents, "
              f"{indexed.token_count:,} tokens", flush=True)  # fmt: skip
        if description is None:
            print(f"  there is no {description_path(prefix)}: no checksums and no tokenizer to compare with")
    if bad:
        raise ValueError(f"{bad} of {len(unique_prefixes(args.datasets))} data sets failed the check")


def show(args: argparse.Namespace) -> None:
    """Prints documents as text, or as ids where no tokenizer is given. Raises ValueError if the first is not there."""
    if args.number < 1:
        raise ValueError(
            f"N is how many documents to show, at least 1, not {args.number}; for the last ones give --first -K"
        )
    indexed = IndexedDataset(data_set_prefix(args.dataset))
    count = indexed.document_count
    first = args.first + count if args.first < 0 else args.first
    if not 0 <= first < count:
        raise ValueError(f"{indexed.prefix} has documents 0 to {count - 1}: there is no document {args.first}")
    tokenizer: Tokenizer | None = None
    if args.tokenizer_model or args.vocab_file or args.tokenizer_type == "NullTokenizer":
        flags = {field.name: getattr(args, field.name) for field in fields(TokenizerConfig)}
        tokenizer = build_tokenizer(TokenizerConfig(**flags), args.vocab_size)
        description = read_description(indexed.prefix)
        differences = description.tokenizer_differences(tokenizer.identity) if description else []
        if differences:
            print(f"warning: this is not the tokenizer of the data: {'; '.join(differences)}", file=sys.stderr)
    for document in range(first, min(first + args.number, count)):
        ids = indexed.get_document(document).tolist()
        print(f"--- document {document}: {len(ids):,} tokens")
        shown = ids if args.tokens is None else ids[: args.tokens]
        text = " ".join(map(str, shown)) if tokenizer is None else tokenizer.detokenize(shown)
        print(text + (" ..." if len(shown) < len(ids) else ""))


def build_index(args: argparse.Namespace) -> None:
    """Builds the indices that a training run with the same flags reads."""
    from megatron.core.config import DataConfig

    names = (
        "data_path", "data_args_path", "split", "train_data_path", "valid_data_path", "test_data_path",
        "per_split_data_args_path", "seq_length", "data_cache_path",
    )  # fmt: skip
    given: dict[str, Any] = {}
    for name in names:
        value = getattr(args, name)
        if value is not None:
            given[name] = tuple(value) if isinstance(value, list) else value
    config = DataConfig(**given)
    if not config.is_given:
        raise ValueError("give --data-path, --train-data-path, --data-args-path or --per-split-data-args-path")
    batch = args.global_batch_size
    steps = args.train_iters if args.train_iters is not None else args.train_samples
    if min(batch, steps) < 1 or min(args.eval_iters, args.eval_interval) < 0:
        raise ValueError(
            "--global-batch-size, --train-iters and --train-samples must be positive, --eval-* not negative"
        )
    train = args.train_samples // batch * batch if args.train_samples is not None else args.train_iters * batch
    evaluated = args.eval_iters * batch if args.eval_interval else 0
    start = time.monotonic()
    datasets = build_train_valid_test_datasets(config, (train, evaluated, evaluated), args.seed, None)
    for name, dataset in zip(("training", "validation", "the test"), datasets, strict=True):
        rows = blend_summary(dataset)
        if dataset is not None and rows:
            print(f"data for {name}: {len(dataset):,} samples of {config.seq_length:,} tokens\n{source_table(rows)}")
    print(f"the indices are ready after {time.monotonic() - start:.1f} s")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the names of training's flags."""
    parser = tool_parser(__doc__, EXAMPLE, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(function=function)
        return made

    one = command("info", info, "Say what is in data sets: documents, tokens, types, tokenizer.")
    one.add_argument("datasets", nargs="+", metavar="DATASET", help="path without .bin and .idx")
    one = command("verify", verify, "Check structure, checksums and that every token id is in the vocabulary.")
    one.add_argument("datasets", nargs="+", metavar="DATASET", help="path without .bin and .idx")
    one.add_argument(
        "--vocab-size", type=int, metavar="N", help="entries of the vocabulary; the description's if absent"
    )
    one = command("show", show, "Decode documents, to see what was stored.")
    one.add_argument("dataset", metavar="DATASET", help="path without .bin and .idx")
    one.add_argument("number", type=int, metavar="N", nargs="?", default=1, help="how many documents (default: 1)")
    one.add_argument(
        "--first", type=int, metavar="K", default=0, help="number of the first one; -K counts from the end (default: 0)"
    )
    one.add_argument("--tokens", type=int, metavar="T", help="show only the first T tokens of each")
    one.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, default="PretrainedTokenizerFromHF")
    one.add_argument("--tokenizer-model", metavar="PATH", help="tokenizer to decode with; without one, ids are shown")
    one.add_argument("--vocab-file", metavar="FILE", help="vocab.json of a GPT-2 tokenizer")
    one.add_argument("--merge-file", metavar="FILE", help="merges.txt of a GPT-2 tokenizer")
    one.add_argument("--vocab-size", type=int, metavar="N", help="entries of the vocabulary, for NullTokenizer")
    one.add_argument("--trust-remote-code", action="store_true", help="allow a tokenizer to run the code in its folder")
    add_build_index(command("build-index", build_index, "Build a run's indices ahead, with the flags of that run."))
    return parsed(parser, argv)


def add_build_index(parser: argparse.ArgumentParser) -> None:
    """Flags of build-index; where training has a default, it is the same."""
    add = parser.add_argument
    for name in ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"):
        add(name, nargs="+", metavar="ARG", help="data sets, each optionally behind its weight")
    add("--data-args-path", metavar="FILE", help="file with the values of --data-path")
    add("--per-split-data-args-path", metavar="FILE", help="JSON file with the values for train, valid and test")
    add("--split", metavar="A,B,C", help="shares of train, validation and test (default: 969,30,1)")
    add("--data-cache-path", metavar="DIR",
        help="where indices go; a folder 'cache' next to the first data set if absent")  # fmt: skip
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens in a sample (default: 4096)")
    add("--seed", type=int, default=1234, metavar="N", help="seed of the order (default: 1234)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--train-iters", type=int, metavar="N", help="steps of the run")
    length.add_argument("--train-samples", type=int, metavar="N", help="samples of the run")
    add("--global-batch-size", type=int, required=True, metavar="N", help="samples in a step")
    add("--eval-interval", type=int, default=1000, metavar="N", help="steps between evaluations (default: 1000)")
    add("--eval-iters", type=int, default=100, metavar="N", help="batches of an evaluation (default: 100)")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(format="warning: %(message)s")
    return run_tool(lambda: args.function(args))


if __name__ == "__main__":
    sys.exit(main())
