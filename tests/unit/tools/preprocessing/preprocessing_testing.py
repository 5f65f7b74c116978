"""Small corpora, the tool's flags for them, and what a run left."""

import gzip
from collections.abc import Sequence
from pathlib import Path


def write_corpus(folder: Path, files: Sequence[Sequence[str]], compressed: int) -> Path:
    """Files 0.jsonl, 1.jsonl, ... of these lines, of which number `compressed` is a .jsonl.gz."""
    folder.mkdir()
    for number, lines in enumerate(files):
        content = "".join(line + "\n" for line in lines).encode()
        path = folder / f"{number}.jsonl"
        if number == compressed:
            path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return folder


def arguments(corpus: Path, prefix: Path, *more: str) -> list[str]:
    """Flags of a run over text that is numbers."""
    return [
        "--input", str(corpus), "--output-prefix", str(prefix), "--tokenizer-type", "NullTokenizer",
        "--vocab-size", "100", "--workers", "1", "--append-eod", *more,
    ]  # fmt: skip


def outputs(prefix: Path) -> dict[str, bytes]:
    """Contents of everything a run left, by what follows its prefix."""
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in prefix.parent.glob(f"{prefix.name}*")}
