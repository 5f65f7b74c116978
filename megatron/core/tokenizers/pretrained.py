"""Tokenizers of Hugging Face model folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.text_files import read_text
from megatron.core.tokenizers import Tokenizer
from megatron.core.tokenizers.settings import FLAGS, added_tokens, checked_size, content, named_tokens, read_settings

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_TEKKEN = "tekken.json"
# From this size on, transformers rewrites the pre-tokenisation of some tokenizer.json files while it loads them.
_LARGEST_UNTOUCHED_VOCABULARY = 100_000


def build_pretrained_tokenizer(model: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of the folder `model`, or of the folder that the file `model` is in.

    A `tokenizer.json` is taken as it is written, which is what transformers does in the folder of a Mixtral; with
    nothing but a `tokenizer.model`, sentencepiece itself is used. transformers is loaded only for what is in neither.
    """
    path = Path(model)
    if path.name == _TEKKEN:
        raise ValueError(_no_tokenizer(path.parent))
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(
            f"--tokenizer-model {model} does not exist: give a folder of this machine with the tokenizer's files "
            "(models are not downloaded)"
        )
    settings = read_settings(folder)
    sentencepiece_files = _sentencepiece_files(path, folder)
    if sentencepiece_files == [path] and path.name != "tokenizer.model":
        return _sentencepiece_tokenizer(path, settings)
    if _remote_code(settings):
        if not trust_remote_code:
            raise ValueError(
                f"the tokenizer in {folder} needs Python code from that folder: read it, then allow it with "
                "--trust-remote-code"
            )
        return _transformers_tokenizer(folder, trust_remote_code)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _load_tokenizer_json(folder / "tokenizer.json")
        if _is_complete(tokenizer, settings, added_tokens(folder, settings)):
            return TokenizerFromJson(folder / "tokenizer.json", tokenizer, settings)
        return _transformers_tokenizer(folder, trust_remote_code)
    if (folder / "vocab.json").is_file() and not sentencepiece_files:
        return _transformers_tokenizer(folder, trust_remote_code)
    if len(sentencepiece_files) != 1:
        raise FileNotFoundError(_no_tokenizer(folder))
    return _sentencepiece_tokenizer(sentencepiece_files[0], settings)


def _sentencepiece_files(path: Path, folder: Path) -> list[Path]:
    """The file that was named, else the folder's tokenizer.model, else those with a version: tokenizer.model.v3."""
    if path.is_file() and path.name.startswith("tokenizer.model."):
        return [path]
    whole = folder / "tokenizer.model"
    return [whole] if whole.is_file() else sorted(folder.glob("tokenizer.model.v*"))


def _no_tokenizer(folder: Path) -> str:
    versions = ", ".join(path.name for path in sorted(folder.glob("tokenizer.model.v*")))
    if versions:
        return f"{folder} has more than one tokenizer ({versions}): name the file, as in {folder}/{versions[:18]}"
    if (folder / _TEKKEN).is_file():
        return (
            f"{folder / _TEKKEN} is a tokenizer of Mistral's own kind, which is not supported: take the "
            "tokenizer.json of the same model in Hugging Face's format"
        )
    return f"{folder} has no tokenizer: none of {', '.join(_FILES)} is there"


def _sentencepiece_tokenizer(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """sentencepiece itself; transformers where the folder adds tokens, which the model's file knows nothing of."""
    from megatron.core.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, read_pieces

    added = added_tokens(path.parent, settings)
    pieces = read_pieces(path)
    if path.name == "tokenizer.model" and (
        any(number >= len(pieces) or pieces[number] != token for number, token in added.items())
        or not set(named_tokens(settings)) <= set(pieces)
    ):
        return _transformers_tokenizer(path.parent, False)
    return SentencePieceTokenizer(path, content(settings.get("eos_token")), content(settings.get("bos_token")))


def _remote_code(settings: dict[str, Any]) -> bool:
    auto_map = settings.get("auto_map")
    return bool(auto_map.get("AutoTokenizer")) if isinstance(auto_map, dict) else bool(auto_map)


def _load_tokenizer_json(path: Path) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(read_text(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception for any broken file, and panics at some
        raise ValueError(f"{path} is not a tokenizer: {error}") from None
    # A file saved after batched use carries settings that would cut or fill up documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_complete(tokenizer: Any, settings: dict[str, Any], listed: dict[int, str]) -> bool:
    """Whether the other files of the folder change nothing about how text becomes ids."""
    import tokenizers

    added = tokenizer.get_added_tokens_decoder()
    for number, token in settings.get("added_tokens_decoder", {}).items():
        if token.keys() - {"content", *FLAGS} or repr(tokenizers.AddedToken(**token)) != repr(added.get(int(number))):
            return False
    contents = {number: token.content for number, token in added.items()}
    return (
        all(contents.get(number) == token for number, token in listed.items())
        and set(named_tokens(settings)) <= set(contents.values())
        and not settings.get("split_special_tokens")
        and tokenizer.get_vocab_size() <= _LARGEST_UNTOUCHED_VOCABULARY
    )


def _transformers_tokenizer(folder: Path, trust_remote_code: bool) -> Tokenizer:
    from megatron.core.tokenizers.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(folder, trust_remote_code)


class TokenizerFromJson(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    kind, file_format = "PretrainedTokenizerFromHF", "tokenizer.json"

    def __init__(self, path: Path, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.paths = [path]
        self._tokenizer = tokenizer
        self.vocab_size = checked_size(path, tokenizer.get_vocab(with_added_tokens=True).values())
        eos = content(settings.get("eos_token"))
        if eos is None:
            raise ValueError(f"{path.parent} names no eos_token in tokenizer_config.json to end documents with")
        self.eod = tokenizer.token_to_id(eos)
        bos = content(settings.get("bos_token"))
        self.bos = None if bos is None else tokenizer.token_to_id(bos)

    @property
    def added_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts; runs on all cores unless TOKENIZERS_PARALLELISM is false."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)
