"""From a line to the texts that are taken from it, or to the reason why there are none."""

import json
from typing import Any

try:
    import orjson
except ImportError:  # the standard library reads the same, several times slower
    orjson = None  # type: ignore[assignment]

BLANK = "blank line"
NOT_JSON, NOT_AN_OBJECT, BAD_UTF8 = "invalid JSON", "not an object", "bad UTF-8"
ONE_A_LINE = "each line must be a JSON object, so write arrays and indented files as one object a line (jq -c)"


class BadDocument(ValueError):
    """A line that cannot be used: `reason` is one of a few kinds to count by, `detail` says more."""

    @property
    def reason(self) -> str:
        """One of a few kinds."""
        return str(self.args[0])

    @property
    def detail(self) -> str:
        """More than the kind, or nothing."""
        return str(self.args[1]) if len(self.args) > 1 else ""


def texts_of_line(line: bytes, keys: list[str]) -> list[str]:
    """The texts under `keys` of a line of JSON. Raises BadDocument."""
    document: Any
    try:
        if orjson is None:
            raise ValueError
        document = orjson.loads(line)
        if type(document) is dict and len(keys) == 1 and type(text := document.get(keys[0])) is str:
            return [text]  # nearly every line
        strict = True
    except ValueError:
        # Once more with the library whose verdict counts: it says where the error is, and takes NaN.
        document = _parse(line)
        strict = False
    if type(document) is not dict:
        raise BadDocument(NOT_AN_OBJECT, f"a JSON object is expected on each line, this is {_kind(document)}")
    for key in keys:
        if key not in document:
            names = ", ".join(map(repr, list(document)[:10])) or "none"
            raise BadDocument("missing key", f"no key {key!r}; its keys are {names}")
    texts = [document[key] for key in keys]
    check_texts(texts, keys)
    if not strict:  # the standard library lets halves of surrogate pairs pass, orjson does not
        for key, text in zip(keys, texts):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise BadDocument("bad escape", f"the value of {key!r} has half of a surrogate pair") from None
    return texts


def check_texts(values: list[Any], keys: list[str]) -> list[str]:
    """The values of `keys` if all are proper strings (bytes of UTF-8 count as such). Raises BadDocument."""
    for i, value in enumerate(values):
        if type(value) is str:
            continue
        if isinstance(value, bytes):
            try:
                values[i] = value.decode("utf-8")
                continue
            except UnicodeDecodeError as error:
                raise BadDocument(BAD_UTF8, f"{error.reason} at byte {error.start + 1} of {keys[i]!r}") from None
        raise BadDocument("not a string", f"the value of {keys[i]!r} is {_kind(value)}, not a string")
    return values


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadDocument(BAD_UTF8, f"{error.reason} at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        if not line.strip():
            raise BadDocument(BLANK) from None
        detail = str(error)
        if isinstance(error, json.JSONDecodeError):
            detail = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if line.strip() in (b"[", b"{"):
            detail = ONE_A_LINE
        raise BadDocument(NOT_JSON, detail) from None


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
