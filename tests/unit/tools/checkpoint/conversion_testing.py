"""Helpers of the conversion tests: the tensors of a folder on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

TOKENIZER = {
    "tokenizer.json": b'{"version": "1.0"}\n',
    "tokenizer_config.json": b"{ }",
    "tokenizer.model": b"\x0a\xff\x00",
}
MakeModel = Callable[..., Path]


def disk_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every safetensors file of a folder, none of them twice."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(found) & set(tensors)
        found |= tensors
    return found


def assert_same_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The tensors on disk have the expected names, types and bits."""
    found = disk_tensors(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
