"""The files beside a tokenizer that name its special and added tokens, checked field by field."""

import re
from pathlib import Path
from typing import Any

from megatron.core.text_files import read_object

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_ADDED = "added_tokens_decoder"


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; a token that the former leaves null keeps the latter's.

    Raises ValueError naming the file and the field of a wrong type.
    """
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            found = {key: value for key, value in read_object(path).items() if value is not None}
            _check(path, found)
            settings.update(found)
    return settings


def added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, str]:
    """Ids and texts of the tokens that a folder adds, by added_tokens.json and by tokenizer_config.json.

    Raises ValueError naming added_tokens.json if it holds anything but ids of texts.
    """
    added = {int(number): token["content"] for number, token in settings.get(_ADDED, {}).items()}
    path = folder / "added_tokens.json"
    if path.is_file():
        for token, number in read_object(path).items():
            if type(number) is not int or not 0 <= number < 1 << 30:
                raise ValueError(f"{path}: {token!r} must have an id, not {number!r:.100}")
            added.setdefault(number, token)
    return added


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
        need(re.fullmatch("[0-9]{1,9}", number) is not None, _ADDED, "an object whose names are ids", number)
        need(isinstance(token, dict) and _is_token(token), f"{_ADDED}: {number}", "an object with content", token)
    extra = settings.get("additional_special_tokens", [])
    need(isinstance(extra, list), "additional_special_tokens", "a list of tokens", extra)
    named = settings.get("extra_special_tokens", [])
    need(isinstance(named, list | dict), "extra_special_tokens", "a list of tokens, or an object of them", named)
    for field, tokens in (("additional_special_tokens", extra), ("extra_special_tokens", named)):
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            typed = isinstance(tokens, list) or isinstance(token, str) or "__type" in token
            need(_is_token(token) and typed, field, "made of texts, or of objects with content and __type", token)
    kind = settings.get("tokenizer_class", "")
    need(isinstance(kind, str), "tokenizer_class", "a text", kind)


def _is_token(token: Any) -> bool:
    if isinstance(token, dict):
        flags = (token.get(flag, False) for flag in _FLAGS)
        return isinstance(token.get("content"), str) and all(isinstance(flag, bool) for flag in flags)
    return isinstance(token, str)
