"""What a run is asked to do, as plain data that worker processes are given."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.description import Origin
from megatron.core.datasets.indexed_dataset import optimal_dtype
from megatron.core.tokenizers import Tokenizer
from tools.preprocessing import inputs
from tools.preprocessing.inputs import Input


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags(TokenizerConfig):
    """What `build_tokenizer` needs."""

    vocab_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line of tools/preprocess_data.py; the fields are its flags."""

    input: list[str]
    output_prefix: str
    json_keys: list[str]
    tokenizer: TokenizerFlags
    tokenizer_backend: str = "auto"
    append_eod: bool = False
    append_bos: bool = False
    workers: int = 1
    log_interval: int = 10000
    max_bad_fraction: float = 0.1
    allow_damaged_files: bool = False
    preview: int = 0
    resume: bool = False

    def fingerprint(self, parts: list[Input], tokenizer: Tokenizer) -> str:
        """SHA-256 (hex) of all that the output's bytes depend on; files count by path, size and time of change."""
        files = [(*part, Path(part.path).stat().st_mtime_ns) for part in parts]
        content = [files, self.json_keys, self.append_eod, self.append_bos, tokenizer.identity, tokenizer.bos]
        content.append(inputs.CHUNK_BYTES)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def origin(self, key: str, tokenizer: Tokenizer) -> Origin:
        """What the description of a key's data set says of its making."""
        record: dict[str, Any] = {**tokenizer.identity, "bos": tokenizer.bos}
        return Origin(key, record, self.append_eod, self.append_bos)


def token_type(tokenizer: Tokenizer) -> Any:
    """NumPy type of the stored tokens."""
    return optimal_dtype(tokenizer.vocab_size)
