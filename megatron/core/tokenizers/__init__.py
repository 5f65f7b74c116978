"""Tokenizers behind one small interface; each is imported only when it is asked for."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from megatron.core.config import TokenizerConfig, TokenizerType


class Tokenizer(ABC):
    """What training and preprocessing need from a tokenizer. No token is ever added to a text by itself."""

    kind: ClassVar[str]
    """What `identity` calls it."""
    file_format: ClassVar[Literal["tokenizer.json", "transformers", "tokenizer.model", "gpt2", "none"]]
    """What it is made from, for tools that run the same files with another library."""
    paths: Sequence[Path] = ()
    """The files for these tools."""
    vocab_size: int
    """Largest token id plus one, added tokens included."""
    eod: int
    """Token id that ends a document."""
    bos: int | None = None
    """Token id that begins a sequence, if the vocabulary has one."""

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Type, vocabulary size, end-of-document id and SHA-256 of the files: equal only if ids mean the same."""
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self._files())}
        return {"type": self.kind, "vocab_size": self.vocab_size, "eod": self.eod, "sha256": hashes}

    def _files(self) -> Iterable[Path]:
        return self.paths

    @property
    @abstractmethod
    def added_tokens(self) -> Sequence[str]:
        """Texts that are tokens as a whole, or would be if text could name them."""

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [self.tokenize(text) for text in texts]

    @abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


TOKENIZER_TYPES: tuple[str, ...] = get_args(TokenizerType)


def _required(kind: str, flag: str, value: str | None) -> str:
    if not value:
        raise ValueError(f"--tokenizer-type {kind} needs {flag}")
    return value


def build_tokenizer(config: TokenizerConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `config` asks for; `vocab_size` is for NullTokenizer, which has no files to take it from.

    Raises ValueError or FileNotFoundError, naming the flag or the file, if it cannot be built.
    """
    kind = config.tokenizer_type
    if kind == "PretrainedTokenizerFromHF":
        from megatron.core.tokenizers.pretrained import build_pretrained_tokenizer

        model = _required(
            kind, "--tokenizer-model (a folder with tokenizer.json or tokenizer.model)", config.tokenizer_model
        )
        return build_pretrained_tokenizer(model, config.trust_remote_code)
    if kind == "Llama2Tokenizer":
        from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        model = _required(kind, "--tokenizer-model (a sentencepiece tokenizer.model)", config.tokenizer_model)
        return SentencePieceTokenizer(model)
    if kind == "GPT2BPETokenizer":
        from megatron.core.tokenizers.gpt2_bpe_tokenizer import GPT2BPETokenizer

        vocab_file = _required(kind, "--vocab-file (vocab.json)", config.vocab_file)
        return GPT2BPETokenizer(vocab_file, _required(kind, "--merge-file (merges.txt)", config.merge_file))
    if kind == "NullTokenizer":
        from megatron.core.tokenizers.null_tokenizer import NullTokenizer

        if vocab_size is None:
            raise ValueError("--tokenizer-type NullTokenizer needs --vocab-size")
        return NullTokenizer(vocab_size)
    raise ValueError(f"--tokenizer-type {kind} is not one of {', '.join(TOKENIZER_TYPES)}")
