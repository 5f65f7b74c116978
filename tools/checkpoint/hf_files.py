"""The files of a Hugging Face model folder: which weights are where, read slice by slice."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron.core.interchange.folder_kind import (
    INDEX_FILE,
    OLD_INDEX_FILE,
    OLD_SINGLE_FILE,
    SINGLE_FILE,
    what_is_there,
)
from megatron.core.interchange.stored_tensor import LoadedTensor, StoredTensor, open_torch, stored_tensor
from tools.checkpoint.model_folder import read_json, read_source_config, usable_file
from tools.checkpoint.safetensors_header import read_header


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
        f"or {OLD_INDEX_FILE}, but {what_is_there(folder)}"
    )


class HuggingFaceFolder:
    """The tensors of a model folder, found by name; nothing is read but headers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_source_config(folder)
        self.tensors: dict[str, StoredTensor | LoadedTensor] = {}
        files, index = weight_files(folder)
        _tell_passed_over(folder)
        for file in files:
            of_file = read_header if file.suffix == ".safetensors" else _torch_header
            found: Mapping[str, StoredTensor | LoadedTensor] = of_file(file)
            for name, stored in found.items():
                if name in self.tensors:
                    raise ValueError(f"{name} is both in {self.tensors[name].file.name} and in {file.name}")
                if index is not None and (name not in index or folder / index[name] != file):
                    raise ValueError(f"{name} is in {file}, but the index says: {index.get(name, 'nowhere')}")
                self.tensors[name] = stored
        missing = sorted(set(index or ()) - set(self.tensors))
        if missing:
            raise ValueError(f"{folder}: the index lists {missing[0]}, which is not in {(index or {})[missing[0]]}")


def _tell_passed_over(folder: Path) -> None:
    """Says which of two sets of weights is read where one of them may be stale."""
    for single, index in ((SINGLE_FILE, INDEX_FILE), (OLD_SINGLE_FILE, OLD_INDEX_FILE)):
        if os.path.lexists(folder / single):
            if os.path.lexists(folder / index):
                print(
                    f"note: {folder} has {single} and {index}: the first is read, as by transformers", file=sys.stderr
                )
            return


def _torch_header(file: Path) -> dict[str, StoredTensor | LoadedTensor]:
    content, records = open_torch(file)
    return {name: stored_tensor(file, records, name, value) for name, value in content.items()}
