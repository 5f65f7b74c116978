"""The small JSON file of an indexed data set, `<prefix>.json`: which tokenizer wrote it, how much is in it, checksums.

Data sets from elsewhere have none; everything here works without torch.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.atomic_files import atomic_writer
from megatron.core.text_files import read_json

VERSION = 2
_OLDER = (1,)  # without `input`
_BLOCK = 1 << 20
_KINDS: dict[str, Any] = {
    "version": int, "key": str | None, "tokenizer": dict, "append_eod": bool, "append_bos": bool, "documents": int,
    "tokens": int, "dtype": str, "sha256": dict, "input": dict | None,
}  # fmt: skip


class Origin(NamedTuple):
    """What the writer of a data set cannot see in the tokens; the fields are those of `DatasetDescription`."""

    key: str | None
    tokenizer: dict[str, Any]
    append_eod: bool
    append_bos: bool
    merged_from: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """What is known of a data set beyond its tokens."""

    version: int = VERSION
    """Version of this record."""
    key: str | None
    """Key of the JSON objects that the texts were taken from."""
    tokenizer: dict[str, Any]
    """`Tokenizer.identity` (type, vocab_size, eod, sha256 in hex by file name) and bos."""
    append_eod: bool
    """Whether each document ends with the end-of-document token."""
    append_bos: bool
    """Whether each document begins with the beginning-of-sequence token."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens."""
    dtype: str
    """NumPy name of the token type."""
    sha256: dict[str, str]
    """SHA-256 in hex of the files `bin` and `idx`."""
    input: dict[str, Any] | None = None
    """What it was made from: `files` (path, documents, bytes; bad_lines, lost_bytes and trouble where there are any),
    `files_not_listed` (how many more there were), `left_aside` (files of other kinds, by ending); None if unknown."""
    merged_from: Sequence[str] = ()
    """Names, without folders, of the data sets that it was merged from; not written if there are none."""

    def tokenizer_differences(self, identity: Mapping[str, Any]) -> list[str]:
        """How the tokenizer that wrote the data set differs from the one of `identity` (see `Tokenizer.identity`)."""
        found = []
        for name, text in (("type", "type"), ("vocab_size", "vocabulary size"), ("eod", "end-of-document id")):
            if self.tokenizer.get(name) != identity.get(name):
                found.append(f"{text} {self.tokenizer.get(name)} in the data, {identity.get(name)} here")
        ours, theirs = identity.get("sha256", {}), self.tokenizer.get("sha256", {})
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                there, here = (str(hashes.get(name, "none"))[:12] for hashes in (theirs, ours))
                found.append(f"{name} has SHA-256 {there} in the data, {here} here")
        return found

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write `<prefix>.json`, whole or not at all."""
        with atomic_writer(description_path(prefix)) as file:
            file.write((self._text() + "\n").encode())

    def _text(self) -> str:
        """JSON with a line for each file."""
        content = {name: value for name, value in asdict(self).items() if name != "merged_from" or value}
        if not self.input:
            return json.dumps(content, indent=2)
        files = ",\n".join(f"      {json.dumps(row)}" for row in self.input["files"])
        content["input"] = self.input | {"files": []}
        return json.dumps(content, indent=2).replace('"files": []', f'"files": [\n{files}\n    ]', 1)


def description_path(prefix: str | os.PathLike[str]) -> Path:
    """The description's file for the data set at `prefix`."""
    return Path(f"{os.fspath(prefix)}.json")


def read_description(prefix: str | os.PathLike[str]) -> DatasetDescription | None:
    """The description of the data set at `prefix`, or None if it has none. Raises ValueError for a broken one."""
    path = description_path(prefix)
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}: prepare the data set again, or remove this file") from None
    if not isinstance(content, dict) or content.get("version") not in (VERSION, *_OLDER):
        raise ValueError(f"{path} is not a description of a data set of version {VERSION}: another program wrote it")
    content.setdefault("input", None)
    merged_from = content.pop("merged_from", [])
    if not isinstance(merged_from, list) or not all(isinstance(name, str) for name in merged_from):
        raise ValueError(f"{path}: merged_from must be a list of names")
    names = {field.name for field in fields(DatasetDescription)} - {"merged_from"}
    missing, unknown = sorted(names - content.keys()), sorted(content.keys() - names)
    problems = [f"it lacks {', '.join(missing)}"] if missing else []
    problems += [f"it has unknown fields {str(unknown[:5])[1:-1]:.200}"] if unknown else []
    if problems:
        raise ValueError(
            f"{path} is not a description of a data set: {'; '.join(problems)}; prepare the data again, or remove it"
        )
    _check_types(path, content)
    return DatasetDescription(**content, merged_from=tuple(merged_from))


def _check_types(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError naming the first field of a wrong type."""
    values = [(name, content[name], kind) for name, kind in _KINDS.items()]
    if isinstance(tokenizer := content["tokenizer"], dict):
        values += [(f"tokenizer.{name}", tokenizer.get(name), int | None) for name in ("vocab_size", "eod", "bos")]
        values.append(("tokenizer.sha256", tokenizer.get("sha256", {}), dict))
    for name, value, kind in values:
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not good or (name.endswith("sha256") and not all(isinstance(each, str) for each in value.values())):
            raise ValueError(
                f"{path}: {name} cannot be {value!r:.100}: prepare the data set again, or remove this file"
            )


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
