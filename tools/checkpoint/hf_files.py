"""The files of a Hugging Face model folder: which weights are where, read slice by slice."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor, open_torch, stored_tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE_FILE, OLD_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".index.json", ".onnx")
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_NAMES.items()}


def safe_path(folder: Path, name: str) -> Path:
    """The file `name` directly or deeper in `folder`.

    Raises ValueError for an absolute name, for `..`, and for a link that leaves the folder, except into the `blobs`
    folder beside `snapshots` that Hugging Face's download cache uses. Raises FileNotFoundError if it is not there.
    """
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{folder} names the weight file {name!r}, which is outside the folder: it is not read")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no file {name}")
    home, target = folder.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_cache:
        raise ValueError(f"{path} is a link to {target}, which is outside the folder: it is not read")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no Hugging Face model folder {folder}")
    return read_json(safe_path(folder, "config.json"))


def companion_files(folder: Path) -> list[Path]:
    """Files of a model folder that are not weights: tokenizer, generation settings, config.json and the like."""
    return [
        safe_path(folder, entry.name)
        for entry in sorted(folder.iterdir())
        if entry.is_file() and not entry.name.startswith(".") and not entry.name.endswith(_WEIGHT_SUFFIXES)
    ]


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files that transformers would load, in its order of preference, and the index if there is one.

    The index maps a tensor's name to its file's. Raises ValueError or FileNotFoundError with the reason.
    """
    for single, index in ((SINGLE_FILE, INDEX_FILE), (OLD_SINGLE_FILE, OLD_INDEX_FILE)):
        if (folder / single).is_file():
            return [safe_path(folder, single)], None
        if (folder / index).is_file():
            weight_map = read_json(safe_path(folder, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{folder / index} has no weight_map from tensor names to file names")
            if not weight_map:
                raise ValueError(f"{folder / index} lists no tensors")
            return [safe_path(folder, name) for name in sorted(set(weight_map.values()))], weight_map
    raise FileNotFoundError(
        f"{folder} has no weights: expected {SINGLE_FILE}, {INDEX_FILE} with its shards, {OLD_SINGLE_FILE} "
        f"or {OLD_INDEX_FILE}"
    )


class HuggingFaceFolder:
    """The tensors of a model folder, found by name; nothing is read but headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.tensors: dict[str, StoredTensor | LoadedTensor] = {}
        files, index = weight_files(folder)
        for file in files:
            found = _safetensors_header(file) if file.suffix == ".safetensors" else _torch_header(file)
            for name, stored in found.items():
                if name in self.tensors:
                    raise ValueError(f"{name} is both in {self.tensors[name].file.name} and in {file.name}")
                if index is not None and (name not in index or folder / index[name] != file):
                    raise ValueError(f"{name} is in {file}, but the index says: {index.get(name, 'nowhere')}")
                self.tensors[name] = stored
        missing = sorted(set(index or ()) - set(self.tensors))
        if missing:
            raise ValueError(f"{folder}: the index lists {missing[0]}, which is not in {(index or {})[missing[0]]}")


def _torch_header(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    content, records = open_torch(file)
    return {name: stored_tensor(file, records, name, value) for name, value in content.items()}


def _safetensors_header(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    try:
        with safe_open(str(file), framework="numpy") as handle:  # checks the header and the file's size
            names = set(handle.keys())
    except SafetensorError as error:
        raise ValueError(f"cannot read {file}: {error}; download it again") from error
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    found: dict[str, StoredTensor | LoadedTensor] = {}
    for name in names:
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} in {file} is of type {entry['dtype']}: only floating types are supported")
        found[name] = StoredTensor(file, tuple(entry["shape"]), dtype, 8 + length + entry["data_offsets"][0])
    return found
