"""What the folders of a conversion are: decided here before the first weight is read, with --dry-run as without.

The source is distinguished from what only looks like it. Of a Hugging Face folder all that transformers reads besides
the weights goes along, and nothing else. The target is where its links lead, apart from the source and empty.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.core.interchange.folder_kind import (
    foreign_kind,
    is_adapter,
    is_model_folder,
    is_per_rank,
    what_is_there,
)
from megatron.core.interchange.layout import TRACKER_FILE
from megatron.core.models.mixtral.hf_config import refuse_quantized
from megatron.core.text_files import LARGEST_LIST, read_object

CONFIG_FILE = "config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.*.json", "*.model", "tokenizer.model.v*", "*.tiktoken", "tekken.json", "vocab.json",
    "vocab.txt",
)  # fmt: skip
_COMPANIONS = (
    *_VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
_COMPANION_FOLDERS = {"additional_chat_templates": "*.jinja", "custom_generate": "*"}
# Settings of a quantization that older programs put next to config.json.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def usable_file(folder: Path, name: str) -> Path:
    """The file `name` directly or deeper in `folder`, opened once; links are followed wherever they lead.

    Raises ValueError for a name that itself leaves the folder, for a link to nothing and for a Git LFS pointer;
    FileNotFoundError if nothing is there.
    """
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or not name.isprintable():
        raise ValueError(f"{folder} names the file {name!a}, which is outside the folder: it is not read")
    path = folder / name
    for part in (path, *path.parents[: len(relative.parts) - 1]):
        if part.is_symlink() and not part.exists():
            there = os.readlink(part)
            raise ValueError(f"{part} is a link to {there}, which is not there: put the file there or in its place")
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no file {name}")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {folder}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, byte order mark or not. Raises ValueError naming the file if it is not one."""
    return read_object(path, LARGEST_LIST)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, which need not have weights. Raises ValueError if they are quantized."""
    if folder.is_file():
        if not is_model_folder(folder.parent):
            _refuse_other_kinds(folder.parent)
        raise ValueError(f"{folder} is a file: give the model folder it belongs to")
    if not folder.is_dir():
        hint = ": a model of the hub has to be downloaded first (hf download)" if _is_hub_name(folder) else ""
        raise FileNotFoundError(f"no Hugging Face model folder {folder}{hint}")
    if not os.path.lexists(folder / CONFIG_FILE):
        _refuse_other_kinds(folder)
        raise FileNotFoundError(
            f"{folder} has no file {CONFIG_FILE}, so it is no model folder: {what_is_there(folder)}"
        )
    config = read_json(usable_file(folder, CONFIG_FILE))
    refuse_quantized(config)
    for name in _QUANTIZATION_FILES:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: quantized weights are not supported, use the unquantized model")
    return config


def read_source_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder whose weights are wanted. Raises ValueError saying what it is if it is another kind."""
    if folder.is_dir() and (is_adapter(folder) or not is_model_folder(folder)):
        _refuse_other_kinds(folder)
    return read_config(folder)


def _refuse_other_kinds(folder: Path) -> None:
    kind = foreign_kind(folder)
    if kind is None and (is_per_rank(folder) or (folder / TRACKER_FILE).exists()):
        kind = (
            "is a Megatron checkpoint, not a Hugging Face model folder: --loader mixtral reads it, and "
            "--huggingface-config-path names the folder that config.json and the tokenizer are in"
        )
    models = sorted(path for path in folder.glob("*/") if is_model_folder(path))
    if kind is None and models:
        kind = f"holds model folders and is none itself: give {' or '.join(map(str, models[:3]))}"
    if kind is not None:
        raise ValueError(f"{folder} {kind}")


def _is_hub_name(path: Path) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None and not path.parent.exists()


def companion_files(folder: Path) -> list[str]:
    """Names of the files of a model folder, apart from config.json and weights, that transformers reads.

    Each is there and can be opened. Raises ValueError or OSError naming one that cannot.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in _COMPANIONS)]
    for inner, pattern in _COMPANION_FOLDERS.items():
        if inner not in names:
            continue
        if not (folder / inner).is_dir():
            usable_file(folder, inner)
            raise ValueError(f"{folder / inner} is not a folder")
        found += [f"{inner}/{name}" for name in _files_of(folder / inner) if fnmatch(name, pattern)]
    code = _code_files(folder)
    for name, setting in code.items():
        if not os.path.lexists(folder / name):
            raise FileNotFoundError(
                f"{folder} has no file {name}, which {setting} names in auto_map: put it there, or take auto_map out"
            )
    if code:  # they may import each other
        found += sorted(set(code) | {name for name in names if name.endswith(".py")})
    for name in found:
        usable_file(folder, name)
    return found


def _files_of(folder: Path) -> list[str]:
    """Names in a folder, also of links to nothing, but for hidden ones and folders: transformers looks into neither."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and not entry.is_dir())


def has_vocabulary(companions: Iterable[str]) -> bool:
    """Whether a tokenizer is among the companion files."""
    return any(fnmatch(name, pattern) for name in companions for pattern in _VOCABULARIES)


def _code_files(folder: Path) -> dict[str, str]:
    """Python files that settings name (`auto_map`), and which do; `REPOSITORY--module.Class` is in none of ours."""
    found: dict[str, str] = {}
    for name in (CONFIG_FILE, "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            named = read_json(folder / name).get("auto_map")
            text = json.dumps(named) if named is not None else ""
            found |= {f"{match}.py": name for match in re.findall(r'"([A-Za-z_]\w*)\.\w+"', text)}
    return found


@dataclass(frozen=True)
class Target:
    """A folder to write, and the hidden one that is written first, on the same disk."""

    name: Path
    """As the user calls it."""
    folder: Path
    """The same without links."""
    staging: Path
    in_place: bool = False
    """Whether weights of a model folder are replaced."""


def open_target(path: Path, sources: Iterable[Path], config_folder: Path | None = None) -> Target:
    """Where to write; nothing is made yet. A folder that is there is filled from inside, since it may be a mount point.

    Raises ValueError if it holds something, unless it is `config_folder`, or is one of the sources, in it or around it.
    """
    folder = Path(os.path.realpath(path))
    if folder.is_symlink():
        raise ValueError(f"{path} is a link that leads back to itself: choose another folder")
    for source in sources:
        _check_apart(path, folder, Path(os.path.realpath(source)), source)
    if not folder.exists():
        return Target(path, folder, folder.with_name(f".{folder.name}.saving"))
    in_place = config_folder is not None and config_folder.exists() and folder.samefile(config_folder)
    if not in_place and (not folder.is_dir() or set(os.listdir(folder)) - _NOT_CONTENT):
        raise ValueError(f"{path} is not an empty folder: choose another one or remove what is in it")
    return Target(path, folder, folder / ".saving", in_place)


# What a killed attempt left, and what new file systems have.
_NOT_CONTENT = {".saving", ".release.saving", "lost+found"}


def _check_apart(path: Path, folder: Path, source: Path, name: Path) -> None:
    if not source.exists():
        return
    if folder.exists() and folder.samefile(source):
        raise ValueError(f"{path} is the folder that is read ({name}): what is written needs another folder")
    if any(parent.exists() and parent.samefile(source) for parent in folder.parents):
        raise ValueError(f"{path} is inside the folder that is read ({name}): choose a folder outside it")
    if folder.exists() and any(parent.samefile(folder) for parent in source.parents):
        raise ValueError(f"{path} contains the folder that is read ({name}): choose another one")
