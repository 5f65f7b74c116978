"""What makes two tokenizers the same."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

FileFormat = Literal["tokenizer.json", "transformers", "tokenizer.model", "gpt2", "none"]
"""What a tokenizer is made from."""


def tokenizer_identity(kind: str, vocab_size: int, eod: int, files: Iterable[Path] = ()) -> dict[str, Any]:
    """A JSON-ready record of a tokenizer: kind, vocabulary size, end-of-document id, SHA-256 (hex) by file name."""
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
    return {"type": kind, "vocab_size": vocab_size, "eod": eod, "sha256": hashes}
