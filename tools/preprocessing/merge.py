"""Putting the parts of several ranks together."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from megatron.core.atomic_files import atomic_writer
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.core.tokenizers import Tokenizer
from tools.preprocessing.inputs import Corpus
from tools.preprocessing.part import Report, quarantine_path
from tools.preprocessing.ranks import Place, part_prefix, status_path
from tools.preprocessing.settings import Settings, token_type
from tools.preprocessing.statistics import Statistics


def merge_parts(
    settings: Settings,
    prefixes: list[str],
    reports: list[Report],
    tokenizer: Tokenizer,
    corpus: Corpus,
    statistics: Statistics,
    check: Callable[[list[int]], None],
) -> None:
    """Write the data sets and the quarantine of the whole from those at `prefixes`.

    `statistics` are those of the whole; `check` may refuse the counts of documents.
    """
    _merge_quarantines(settings.output_prefix, prefixes, reports)
    with ExitStack() as stack:
        writers = []
        for key in settings.json_keys:
            name = f"{settings.output_prefix}_{key}_document"
            writer = stack.enter_context(IndexedDatasetWriter(name, token_type(tokenizer)))
            for prefix in prefixes:
                writer.add_file(f"{prefix}_{key}_document")
            writers.append(writer)
        check([writer.document_count for writer in writers])
        for number, (key, writer) in enumerate(zip(settings.json_keys, writers)):
            writer.finalize(settings.origin(key, tokenizer), statistics.record(corpus, number))


def _merge_quarantines(output: str, prefixes: list[str], reports: list[Report]) -> None:
    """Line numbers of a file that several ranks share count from where each began; here they become the file's."""
    parts = [quarantine_path(prefix) for prefix in prefixes]
    if not any(part.exists() for part in parts):
        quarantine_path(output).unlink(missing_ok=True)
        return
    lines_before: dict[str, int] = {}
    with atomic_writer(quarantine_path(output)) as file:
        for part, report in zip(parts, reports):
            if part.exists():
                with open(part, "rb") as entries:
                    for line in entries:
                        entry = json.loads(line)
                        entry["line"] += lines_before.get(entry["file"], 0)
                        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            before = lines_before.get(report.last_file, 0)
            lines_before = {report.last_file: before + report.last_file_lines}


def remove_part(settings: Settings, place: Place) -> None:
    """Remove a rank's files, which are in the whole now."""
    prefix = part_prefix(settings.output_prefix, place)
    # First what says that the part is complete: a kill in between must not leave that without the part.
    status_path(settings.output_prefix, place).unlink(missing_ok=True)
    for key in settings.json_keys:
        for suffix in ("idx", "bin", "json"):
            Path(f"{prefix}_{key}_document.{suffix}").unlink(missing_ok=True)
    quarantine_path(prefix).unlink(missing_ok=True)
