#!/usr/bin/env python3
"""Merge indexed data sets into one, in natural order of their names; memory does not grow with their size."""

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron.core.datasets.description import DatasetDescription, Origin, read_description
from megatron.core.datasets.indexed_dataset import IndexedDataset, data_set_prefix
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from tools.preprocessing.inputs import identity, natural_order
from tools.run_tool import parsed, run_tool, tool_parser

EXAMPLES = """examples:
  python tools/merge_datasets.py --input encoded/parts --output-prefix encoded/corpus_text_document
  python tools/merge_datasets.py --input a_text_document b_text_document --output-prefix ab_text_document
The first takes every data set of a folder, the second those named, in the order given."""


def find_data_sets(patterns: list[str], output: str) -> list[str]:
    """Prefixes of the data sets in folders and of those named. Raises ValueError or FileNotFoundError."""
    found: list[str] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            stems = {str(path.with_suffix("")) for end in ("bin", "idx") for path in Path(pattern).glob(f"*.{end}")}
            if not stems:
                raise ValueError(f"--input {pattern} has no data sets (.bin and .idx) in it")
            found += _without_results(sorted(stems, key=natural_order))
        else:
            found.append(data_set_prefix(pattern))
    names: dict[tuple[int | str, ...], str] = {}
    for prefix in found:
        file = identity(f"{prefix}.bin")
        if file in names:
            also = "" if names[file] == prefix else f" (also as {prefix})"
            raise ValueError(f"--input names {names[file]}{also} twice: name it once")
        names[file] = prefix
    if any(identity(f"{output}.{end}") == identity(f"{prefix}.{end}") for prefix in found for end in ("bin", "idx")):
        raise ValueError(f"--output-prefix {output} is one of the inputs: choose another name, or move it away")
    return found


def _without_results(prefixes: list[str]) -> list[str]:
    """The data sets of a folder but for those that were merged from others of them; says which are left out."""
    names = {Path(prefix).name for prefix in prefixes}
    kept = []
    for prefix in prefixes:
        description = read_description(prefix)
        sources = set(description.merged_from) if description is not None else set()
        if sources and sources <= names - {Path(prefix).name}:
            print(f"left out {prefix}: it was merged from {', '.join(sorted(sources))}", file=sys.stderr)
        else:
            kept.append(prefix)
    return kept


def _warn_of_doubles(described: dict[str, DatasetDescription]) -> None:
    """Tells of documents that will be in the result twice, as far as descriptions know."""
    same: dict[str | None, str] = {}
    inputs = {Path(prefix).name for prefix in described}
    for prefix, description in described.items():
        first = same.setdefault(description.sha256.get("bin"), prefix)
        merged = set(description.merged_from)
        if first != prefix and description.documents:
            print(f"warning: {prefix} has the same tokens as {first}: they will be there twice", file=sys.stderr)
        elif again := merged & (inputs - {Path(prefix).name}):
            names = ", ".join(sorted(again))
            print(f"warning: {prefix} was merged from {names}, which will be there twice", file=sys.stderr)
        elif merged:
            print(f"note: {prefix} was itself merged from {', '.join(sorted(merged))}", file=sys.stderr)


def common_origin(prefixes: list[str]) -> Origin | None:
    """What all descriptions say of their making; None, with a warning, if one is missing. Raises ValueError."""
    descriptions = [read_description(prefix) for prefix in prefixes]
    _warn_of_doubles({prefix: found for prefix, found in zip(prefixes, descriptions) if found is not None})
    origins: list[Origin] = []
    for prefix, description in zip(prefixes, descriptions):
        if description is None:
            print(f"warning: {prefix} has no description (.json), so the result gets none", file=sys.stderr)
            return None
        origins.append(Origin(**{name: asdict(description)[name] for name in Origin._fields}))
    first = origins[0]
    for prefix, origin in zip(prefixes, origins):
        for name in ("tokenizer", "append_eod", "append_bos"):
            if getattr(origin, name) != getattr(first, name):
                raise ValueError(f"{prefix} and {prefixes[0]} differ in their {name} (see their .json): not merged")
    return first if all(origin.key == first.key for origin in origins) else first._replace(key=None)


def merge(patterns: list[str], output: str) -> None:
    """Write the merged data set. Raises ValueError or OSError with a sentence for the user."""
    output = data_set_prefix(output)
    if os.path.basename(output) in ("", ".", ".."):
        raise ValueError(f"--output-prefix {output} is a folder: add the beginning of the files' names")
    prefixes = find_data_sets(patterns, output)
    origin = common_origin(prefixes)
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for number, prefix in enumerate(prefixes, start=1):
            writer.add_file(prefix)
            print(f"{number} of {len(prefixes)}: {prefix}, {writer.token_count} tokens so far", file=sys.stderr)
        names = tuple(Path(prefix).name for prefix in prefixes)
        writer.finalize(None if origin is None else origin._replace(merged_from=names))
    print(f"{output}.bin and .idx: {writer.document_count} documents, {writer.token_count} tokens")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    parser = tool_parser(__doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("--input", required=True, metavar="PATH", nargs="+", action="extend",
                        help="folders of data sets, or prefixes of single ones")  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help="the merged data set without .bin")
    args = parsed(parser, argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return run_tool(lambda: merge(args.input, args.output_prefix), interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
