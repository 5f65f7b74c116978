"""The files that a run makes or removes, and which of them are not its to replace."""

import os
from pathlib import Path

from tools.preprocessing.inputs import Corpus, identity
from tools.preprocessing.journal import journal_path
from tools.preprocessing.kinds import is_product, printable, read_head
from tools.preprocessing.part import quarantine_path
from tools.preprocessing.settings import Settings


def check_outputs(settings: Settings, corpus: Corpus) -> None:
    """Raises ValueError if a file that is read, or that this tool has not written, would be replaced or removed."""
    read = {identity(part.path) for part in corpus.files}
    prefix, suffixes = settings.output_prefix, ("bin", "idx", "json")
    data_sets = [Path(f"{prefix}_{key}_document.{suffix}") for key in settings.json_keys for suffix in suffixes]
    for path in (*data_sets, quarantine_path(prefix), journal_path(prefix)):
        if not path.exists():
            continue
        name, advice = printable(str(path)), "choose another --output-prefix, or move it away"
        if not path.is_file():
            raise ValueError(f"{name}, where this run writes, is not a file: {advice}")
        if identity(str(path)) in read:
            raise ValueError(f"{name} is an input, and this run would replace it: {advice}")
        # Tokens look like anything, and a journal that goes on is judged by its checksum.
        journal = settings.resume and path == journal_path(prefix)
        head = b"" if journal or path.suffix == ".bin" else read_head(os.fspath(path))
        if head and not is_product(head):
            raise ValueError(f"{name}, where this run writes, is not from this tool: {advice}")
