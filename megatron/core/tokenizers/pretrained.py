"""Tokenizers of Hugging Face model folders."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core.tokenizers import Tokenizer
from megatron.core.tokenizers.identity import tokenizer_identity

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# From this size on, transformers rewrites the pre-tokenisation of some tokenizer.json files while it loads them.
_LARGEST_UNTOUCHED_VOCABULARY = 100_000


def build_pretrained_tokenizer(model: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of the folder `model`, or of the folder that the file `model` is in.

    A `tokenizer.json` is taken as it is written, which is what transformers does beside a Mixtral `config.json`; with
    nothing but a `tokenizer.model`, sentencepiece itself is used. transformers is loaded only for what is in neither.
    """
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(
            f"--tokenizer-model {model} does not exist: give a folder of this machine with the tokenizer's files "
            "(models are not downloaded)"
        )
    settings = _read_settings(folder)
    if _remote_code(settings):
        if not trust_remote_code:
            raise ValueError(
                f"the tokenizer in {folder} is Python code of its own: read it, then allow it with --trust-remote-code"
            )
        return _transformers_tokenizer(folder, trust_remote_code)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load_tokenizer_json(folder / "tokenizer.json")
        if _is_complete(tokenizer, settings):
            return TokenizerFromJson(folder / "tokenizer.json", tokenizer, settings)
        return _transformers_tokenizer(folder, trust_remote_code)
    if (folder / "tokenizer.model").is_file():
        from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        added = 1 + max(map(int, settings.get("added_tokens_decoder", {})), default=-1)
        return SentencePieceTokenizer(
            folder / "tokenizer.model", _content(settings.get("eos_token")), _content(settings.get("bos_token")), added
        )
    if (folder / "vocab.json").is_file():
        return _transformers_tokenizer(folder, trust_remote_code)
    raise FileNotFoundError(f"{folder} has no tokenizer: none of {', '.join(_FILES)} is there")


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; a token that the former leaves null keeps the latter's."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(f"{path} must hold a JSON object")
            settings.update({key: value for key, value in content.items() if value is not None})
    return settings


def _remote_code(settings: dict[str, Any]) -> bool:
    auto_map = settings.get("auto_map")
    return bool(auto_map.get("AutoTokenizer")) if isinstance(auto_map, dict) else bool(auto_map)


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _load_tokenizer_json(path: Path) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any broken file
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    # A file saved after batched use carries settings that would cut or fill up documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_complete(tokenizer: Any, settings: dict[str, Any]) -> bool:
    """Whether the configuration beside tokenizer.json changes nothing about how text becomes ids."""
    added = tokenizer.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    for index, wanted in settings.get("added_tokens_decoder", {}).items():
        token = added.get(int(index))
        if token is None or any(getattr(token, flag) != wanted.get(flag, getattr(token, flag)) for flag in flags):
            return False
    named = [_content(settings.get(name)) for name in _SPECIAL_TOKENS]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(name) or []
        named += [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    return (
        all(token in contents for token in named if token is not None)
        and not settings.get("split_special_tokens")
        and tokenizer.get_vocab_size() <= _LARGEST_UNTOUCHED_VOCABULARY
    )


def _transformers_tokenizer(folder: Path, trust_remote_code: bool) -> Tokenizer:
    from megatron.core.tokenizers.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(folder, trust_remote_code)


class TokenizerFromJson:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: Path, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.paths = [path]
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        eos = _content(settings.get("eos_token"))
        if eos is None:
            raise ValueError(f"{path.parent} names no eos_token in tokenizer_config.json to end documents with")
        self.eod: int = tokenizer.token_to_id(eos)
        bos = _content(settings.get("bos_token"))
        self.bos: int | None = None if bos is None else tokenizer.token_to_id(bos)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `Tokenizer.identity`."""
        return tokenizer_identity("PretrainedTokenizerFromHF", self.vocab_size, self.eod, self.paths)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts; runs on all cores unless TOKENIZERS_PARALLELISM is false."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)
