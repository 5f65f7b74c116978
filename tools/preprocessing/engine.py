"""Engines that turn texts into token ids: the reference tokenizer itself, or a faster one that gives the same ids."""

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron.core.text_files import read_text
from megatron.core.tokenizers import Tokenizer
from tools.preprocessing.vocabulary import sentencepiece_json

BACKENDS = ("auto", "gigatoken", "hf", "sentencepiece")
# Steps of a tokenizer.json that do not look at what kind of character one is; "Regex" is no step, but a pattern's kind.
_CLASSLESS = {
    "BPE", "ByteFallback", "Fuse", "Metaspace", "Precompiled", "Prepend", "Replace", "Sequence", "Strip",
    "TemplateProcessing",
}  # fmt: skip
_GIGATOKEN_MISSING = "the package gigatoken is not installed (pip install gigatoken)"
# What libraries disagree about first: spaces, special tokens in the text, joined, unassigned and new characters.
PROBES = (
    "", " ", "  two  spaces ", "\n\n\n", "\t\r\n x", " \xa0\u3000\u2028\x85", "</s><s> </s>", "a<s>b",
    "<unk><|endoftext|>", "<0x0A>", "▁▁a ▁", ".  Guido", "12345 3.14", "e\u0301é ﬁ① İßǅ",
    "    def f(x):\n\t\treturn 'it's' + \"we'll\"",
    "中文，字。日本語한국어", "👩‍👩‍👧🏳️‍🌈", "\0\x07\ufeff\ufffd", "\U0010ffff\ue000\U000331ff's", "ࢗ'll", "a" * 300,
    " " * 100 + "x", "http://a.b/c?d=e&f#g", "שלום مرحبا", "==--//**", "\u200bzero\u200dwidth",
)  # fmt: skip
_TOKENS_A_PROBE = 20
# gigatoken's time to start grows with the square of a token's length.
_LONGEST_ADDED_TOKEN = 1000


class EngineUnavailable(Exception):
    """This engine cannot run this tokenizer here; the message says why."""


class Engine(Protocol):
    """Something that gives the ids of texts."""

    name: str

    def encode_batch(self, texts: list[str]) -> list[Any]:
        """Ids of each text, as a list or an integer array. Raises ValueError for a text that has none."""


class ReferenceEngine:
    """The tokenizer as training and export use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = reference_name(tokenizer)
        self.encode_batch = tokenizer.tokenize_batch


class GigatokenEngine:
    """gigatoken's encoder of a tokenizer.json; one text at a time, which is its fastest path in one thread."""

    name = "gigatoken"

    def __init__(self, source: str, reference: Tokenizer) -> None:
        self._source, self._reference = source, reference
        self._has_classes = has_classes(source)
        _check_added_tokens(source, reference)
        self.restart()

    def restart(self) -> None:
        """Forget the words it has seen, whose memory grows with the text."""
        try:
            from gigatoken.gigatoken_rs import load_hf_json

            self._encode = load_hf_json(self._source).encode
        except ImportError:
            raise EngineUnavailable(_GIGATOKEN_MISSING) from None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # whatever it does not support, a panic of its Rust among it
            reason = str(error).strip().split("\n")[0]
            raise EngineUnavailable(f"gigatoken cannot run this tokenizer ({reason})") from None

    def encode_batch(self, texts: list[str]) -> list[Any]:
        if self._has_classes:
            return [self._encode(text) if is_settled(text) else self._reference.tokenize(text) for text in texts]
        return [self._encode(text) for text in texts]


def _check_added_tokens(source: str, reference: Tokenizer) -> None:
    """Raises EngineUnavailable for what gigatoken ignores, which shows in few texts only, or takes too long for."""
    try:
        tokens = json.loads(source)["added_tokens"]
        spaced = any(token["content"][:1].isspace() for token in tokens)
        problems = [_problem_of_added_token(token, spaced, reference.vocab_size) for token in tokens]
    except (ValueError, TypeError, KeyError, AttributeError):  # other libraries read more than is JSON
        problems = ["its added tokens cannot be read"]
    for problem in problems:
        if problem is not None:
            raise EngineUnavailable(f"gigatoken cannot run this tokenizer ({problem})")


def _problem_of_added_token(token: dict[str, Any], spaced: bool, size: int) -> str | None:
    name = repr(token["content"][:100])
    if not 0 <= token["id"] < size:  # it has a place for each id up to that
        return f"token {name} has the id {token['id']!r:.100}, which the vocabulary of {size} has not"
    if len(token["content"]) > _LONGEST_ADDED_TOKEN:
        return f"token {name} is of {len(token['content'])} characters"
    if token.get("single_word"):
        return f"token {name} is single_word"
    if spaced and token.get("rstrip"):
        return f"token {name} is rstrip, and others begin with a space"
    return None


def has_classes(source: str) -> bool:
    """Whether a tokenizer.json cuts or changes texts by Unicode classes, which depend on the version of Unicode."""
    # A key before a string: entries of the vocabulary that have these names stand before numbers.
    kinds = set(re.findall(r'"type"\s*:\s*"(\w+)"', source))
    return not kinds <= _CLASSLESS or re.search(r'"Regex"\s*:\s*"', source) is not None


def is_settled(text: str) -> bool:
    """Whether all characters have been in Unicode for long: libraries class newer ones differently."""
    return text.isascii() or not _unassigned()[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any()


@cache
def _unassigned() -> Any:
    return np.array([unicodedata.category(chr(code)) == "Cn" for code in range(0x110000)])


class TokenizersEngine:
    """The `tokenizers` library with GPT-2's vocab.json and merges.txt."""

    name = "hf"

    def __init__(self, source: str, reference: Tokenizer) -> None:
        import tokenizers

        self._reference = reference
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise EngineUnavailable(f"tokenizers cannot run this tokenizer ({error})") from None

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [
            self._tokenizer.encode(text, add_special_tokens=False).ids
            if is_settled(text)
            else self._reference.tokenize(text)
            for text in texts
        ]


def reference_name(tokenizer: Tokenizer) -> str:
    """The backend that the tokenizer itself is, or "reference" for one of our own."""
    names = {"tokenizer.json": "hf", "transformers": "hf", "tokenizer.model": "sentencepiece"}
    return names.get(tokenizer.file_format, "reference")


def make_engine(name: str, reference: Tokenizer, source: str | None) -> Engine:
    """The engine `name` for what `reference` computes, from what `engine_source` gave. Raises EngineUnavailable."""
    if name == reference_name(reference):
        return ReferenceEngine(reference)
    assert source is not None
    if name == "gigatoken":
        return GigatokenEngine(source, reference)
    if name == "hf":
        return TokenizersEngine(source, reference)
    from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

    return ReferenceEngine(SentencePieceTokenizer(source))


def engine_source(name: str, reference: Tokenizer) -> str | None:
    """What engine `name` is built from, to be made once for all workers. Raises EngineUnavailable."""
    if name == reference_name(reference):
        return None
    paths, kind = reference.paths, reference.file_format
    if name == "sentencepiece":
        model = paths[0].parent / "tokenizer.model" if paths else None
        if model is None or not model.is_file():
            raise EngineUnavailable("there is no tokenizer.model for sentencepiece")
        return str(model)
    if kind == "gpt2":
        from megatron.core.tokenizers.gpt2_bpe_tokenizer import gpt2_tokenizer_json

        return gpt2_tokenizer_json(paths[0], paths[1])
    if name == "hf" and kind == "tokenizer.model":
        raise EngineUnavailable(
            "there is no tokenizer.json, and what `tokenizers` makes of a tokenizer.model gives other ids"
        )
    if name == "gigatoken" and kind == "tokenizer.json":
        return read_text(paths[0])
    if name == "gigatoken" and kind == "transformers":
        return _transformers_json(reference)
    if name == "gigatoken" and kind == "tokenizer.model":
        return _sentencepiece_json(paths[0])
    raise EngineUnavailable(f"{name} cannot run a tokenizer of type {type(reference).__name__}")


def _transformers_json(tokenizer: Any) -> str:
    content = tokenizer.backend_json()
    if content is None:
        raise EngineUnavailable("transformers runs this tokenizer in a way that no tokenizer.json describes")
    return content


def _sentencepiece_json(model: Path) -> str:
    try:
        return sentencepiece_json(model.read_bytes())
    except ImportError:
        raise EngineUnavailable(_GIGATOKEN_MISSING) from None
    except Exception as error:  # a reader without checks: of any type
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise EngineUnavailable(f"gigatoken cannot run this tokenizer ({reason})") from None


def probes(reference: Tokenizer, source: str | None) -> list[str]:
    """`PROBES`, and each token that text can name, next to, between and within words, and in capitals."""
    texts = list(PROBES)
    tokens = dict.fromkeys(reference.added_tokens)
    if source is not None and source.startswith("{"):
        tokens |= dict.fromkeys(token["content"] for token in json.loads(source)["added_tokens"])
    names = [token for token in tokens if token]
    for start in range(0, len(names), _TOKENS_A_PROBE):
        some = names[start : start + _TOKENS_A_PROBE]
        texts += some
        texts.append("".join(f"the {token} two{token}a  {token}\n{token}{token} \n.{token}.  " for token in some))
        texts.append("".join(f" {token.lower()} {token.upper()}{token[:-1]} {token[1:]}_{token}9" for token in some))
    return texts


def first_difference(engine: Engine, reference: Tokenizer, texts: Sequence[str]) -> str | None:
    """What is different in the first of `texts` that the engine encodes otherwise than the reference, or None."""
    for text in texts:
        try:
            expected = reference.tokenize(text)
        except ValueError:
            continue
        found = [int(token) for token in engine.encode_batch([text])[0]]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
            near = reference.detokenize(expected[max(at - 4, 0) : at + 4])
            return f"{engine.name} gives {found[at : at + 4]} near {near!r}, the reference {expected[at : at + 4]}"
    return None
