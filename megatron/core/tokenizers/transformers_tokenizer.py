"""Tokenizers that only transformers can run."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core.tokenizers.identity import tokenizer_identity


class TransformersTokenizer:
    """transformers' AutoTokenizer on a local folder; slow to start, for folders that need its code."""

    def __init__(self, folder: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        self._folder = folder
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"transformers cannot load the tokenizer in {folder}: {error}") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {folder} has no eos_token to end documents with")
        self.eod: int = self._tokenizer.eos_token_id
        self.bos: int | None = self._tokenizer.bos_token_id
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `Tokenizer.identity`."""
        names = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"}
        files = [path for path in self._folder.iterdir() if path.name in names or path.suffix == ".py"]
        return tokenizer_identity("PretrainedTokenizerFromHF", self.vocab_size, self.eod, files)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(map(int, ids))))
