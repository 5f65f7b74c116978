"""The files of a tokenizer's folder that name its special and added tokens, checked field by field."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.core.text_files import read_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Far above any vocabulary; libraries allocate for every id below the largest.
MOST_TOKENS = 1 << 22
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_KINDS: dict[str, tuple[Any, str]] = {
    "tokenizer_class": (str, "a text"),
    "auto_map": (dict | list, "an object or a list"),
    "model_max_length": (int | float, "a number"),
    "sp_model_kwargs": (dict, "an object"),
    "chat_template": (str | list | dict, "a text, a list or an object"),
    "padding_side": (str, "a text"),
    "truncation_side": (str, "a text"),
    "model_input_names": (list, "a list"),
    "init_inputs": (list, "a list"),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy",
         "split_special_tokens", "fix_mistral_regex"),
        (bool, "true or false"),
    ),
}  # fmt: skip
_ADDED, _ADDITIONAL, _EXTRA = "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json and special_tokens_map.json, as transformers puts them together, without null.

    The latter replaces what the former says, unless the former has added_tokens_decoder: then it is not read. Raises
    ValueError naming the file and the field of a wrong type.
    """
    settings = _read(folder / "tokenizer_config.json")
    named = _read(folder / "special_tokens_map.json")
    if settings.get(_ADDED) is None:
        extra = settings.get(_EXTRA), named.get(_EXTRA)
        settings.update(named)
        if all(isinstance(tokens, list) for tokens in extra):
            settings[_EXTRA] = [token for tokens in extra for token in tokens or ()]
    return {name: value for name, value in settings.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = _read_texts(path)
    _check(path, {name: value for name, value in found.items() if value is not None})
    return found


def _read_texts(path: Path) -> dict[str, Any]:
    """The object in a JSON file, all of whose texts can be written again."""
    found = read_object(path)
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path} has half of a surrogate pair in a text") from None
    return found


def named_tokens(settings: dict[str, Any]) -> list[str]:
    """Texts of all tokens that the settings name, whatever for; transformers adds those that are not there."""
    names = {name for name in settings if name.endswith("_token")}
    tokens = [settings[name] for name in names if _is_token(settings[name])]
    for name in (_ADDITIONAL, _EXTRA):
        extra = settings.get(name, [])
        tokens += extra.values() if isinstance(extra, dict) else extra
    return [text for text in map(content, tokens) if text is not None]


def added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Ids and texts of the tokens that a folder adds: by tokenizer_config.json, or if not there by added_tokens.json.

    Raises ValueError naming added_tokens.json if it holds anything but ids of texts.
    """
    added = {int(number): token["content"] for number, token in settings.get(_ADDED, {}).items()}
    path = folder / "added_tokens.json"
    if path.is_file():
        for token, number in _read_texts(path).items():
            if type(number) is not int or not 0 <= number < MOST_TOKENS:
                raise ValueError(f"{path}: {token!r:.100} must have an id below {MOST_TOKENS}, not {number!r:.100}")
            if _ADDED not in settings:
                added[number] = token
    return added


def checked_size(path: Path, ids: Iterable[int]) -> int:
    """The largest id plus one. Raises ValueError naming the file if that is no size of a vocabulary."""
    size = 1 + max(ids, default=-1)
    if not 0 < size <= MOST_TOKENS:
        raise ValueError(
            f"{path} has token ids up to {size - 1}: a vocabulary has at least one and {MOST_TOKENS} at most"
        )
    return size


def content(token: Any) -> str | None:
    """The text of a token, which a file writes as such or as an object."""
    return token["content"] if isinstance(token, dict) else token


def _check(path: Path, settings: dict[str, Any]) -> None:
    def need(good: bool, field: str, what: str, found: Any) -> None:
        if not good:
            raise ValueError(f"{path}: {field} must be {what}, not {found!r:.100}")

    for name in SPECIAL_TOKENS:
        if name in settings:
            need(_is_token(settings[name]), name, "a text or an object with a text as content", settings[name])
    added = settings.get(_ADDED, {})
    need(isinstance(added, dict), _ADDED, "an object of ids and tokens", added)
    for number, token in added.items():
        is_id = re.fullmatch("[0-9]{1,9}", number) is not None and int(number) < MOST_TOKENS
        need(is_id, _ADDED, f"an object whose names are ids below {MOST_TOKENS}", number)
        need(isinstance(token, dict) and _is_token(token), f"{_ADDED}: {number}", "an object with content", token)
    extra = settings.get(_ADDITIONAL, [])
    need(isinstance(extra, list), _ADDITIONAL, "a list of tokens", extra)
    named = settings.get(_EXTRA, [])
    need(isinstance(named, list | dict), _EXTRA, "a list of tokens, or an object of them", named)
    for field, tokens in ((_ADDITIONAL, extra), (_EXTRA, named)):
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            good = _is_token(token) and (isinstance(tokens, list) or isinstance(token, str) or "__type" in token)
            need(good, field, "made of texts, or of objects with content and __type", token)
    for field, (kinds, what) in _KINDS.items():
        if field in settings:
            value = settings[field]
            need(isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool)), field, what, value)


def _is_token(token: Any) -> bool:
    if isinstance(token, dict):
        flags = (token.get(flag, False) for flag in FLAGS)
        return isinstance(token.get("content"), str) and all(isinstance(flag, bool) for flag in flags)
    return isinstance(token, str)
