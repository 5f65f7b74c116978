"""The files of a Hugging Face model folder: which weights are where, read slice by slice."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron.core.interchange.folder_kind import INDEX_FILE, OLD_INDEX_FILE, OLD_SINGLE_FILE, SINGLE_FILE
from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor, open_torch, stored_tensor
from tools.checkpoint.model_folder import read_json, read_source_config, usable_file

SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_DTYPES = {theirs: ours for ours, theirs in SAFETENSORS_NAMES.items()}


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files that transformers would load, in its order of preference, and the index if there is one.

    The index maps a tensor's name to its file's. Raises ValueError or FileNotFoundError with the reason.
    """
    for single, index in ((SINGLE_FILE, INDEX_FILE), (OLD_SINGLE_FILE, OLD_INDEX_FILE)):
        if os.path.lexists(folder / single):
            return [usable_file(folder, single)], None
        if os.path.lexists(folder / index):
            weight_map = read_json(usable_file(folder, index)).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{folder / index} has no weight_map from tensor names to file names")
            if not weight_map:
                raise ValueError(f"{folder / index} lists no tensors")
            return [usable_file(folder, name) for name in sorted(set(weight_map.values()))], weight_map
    raise FileNotFoundError(
        f"{folder} has no weights: expected {SINGLE_FILE}, {INDEX_FILE} with its shards, {OLD_SINGLE_FILE} "
        f"or {OLD_INDEX_FILE}"
    )


class HuggingFaceFolder:
    """The tensors of a model folder, found by name; nothing is read but headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_source_config(folder)
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
    for name in sorted(names):
        entry = header[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(
                f"{name} in {file} is of type {entry['dtype']}: only floating types of at least 16 bits are supported; "
                "if the weights are quantized, use the unquantized model"
            )
        found[name] = StoredTensor(file, tuple(entry["shape"]), dtype, 8 + length + entry["data_offsets"][0])
    return found
