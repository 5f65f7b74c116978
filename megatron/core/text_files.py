"""Text and JSON that others wrote: read with one sentence for what is wrong, printed without its control characters."""

import json
import os
import re
from pathlib import Path
from typing import Any

# Line breaks and tabs only lay text out; every other control character, and those that turn the direction of text,
# can make a terminal do or show something else.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` as it may go to a terminal: control characters are written as `\\x1b`."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, without the mark that Windows editors put in front. Raises ValueError naming it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises ValueError naming the file."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: it is not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{os.fspath(path)} is damaged: it nests values too deeply") from None


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError naming the file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} holds a {type(content).__name__}, not an object with names and values")
    return content
