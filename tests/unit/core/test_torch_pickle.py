"""`.pt` files read and written without torch, against torch; what is planted in them does nothing."""

import argparse
import contextlib
import os
import pickle
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.interchange.element_types import STORED_AS, cast, from_torch, to_torch
from megatron.core.interchange.stored_tensor import open_torch, stored_tensor
from megatron.core.interchange.torch_pickle import TensorEntry, read_pickle, write_pickle


def test_tensors_in_a_file_of_torch_are_found(tmp_path: Path) -> None:
    """Views, gaps, transposed and empty tensors, parameters, and what training keeps besides weights."""
    base = torch.randn(6, 8)
    tensors = {
        "whole": base, "rows": base[2:4], "columns": base[:, 3:5], "turned": base.T, "half": base.bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(3)), "none": torch.empty(0, 4),
        "double": base.double(), "short": base.half(), "thin": torch.randn(5, 1).T,
    }  # fmt: skip
    rest = {
        "args": Namespace(n=1, kind=torch.bfloat16, device=torch.device("cpu"), size=torch.Size([2]), raw=b"\xff\x00"),
        "numbers": [1, -1, 255, 1 << 40, -(1 << 70), 2.5, float("inf"), None, True, {3, 4}],
        "rng": torch.arange(5, dtype=torch.uint8), "count": torch.tensor(7), "many": torch.ones(2, dtype=torch.uint16),
        "ordered": OrderedDict(a=1),
    }  # fmt: skip
    torch.save({"model": tensors, **rest}, tmp_path / "a.pt")
    content, records = open_torch(tmp_path / "a.pt")
    for name, tensor in tensors.items():
        stored = stored_tensor(tmp_path / "a.pt", records, name, content["model"][name])
        assert stored.shape == tuple(tensor.shape) and torch.equal(to_torch(stored.read(), stored.dtype), tensor), name
    args = content["args"]
    assert isinstance(args, Namespace) and (args.n, str(args.kind), args.device) == (1, "torch.bfloat16", "cpu")
    assert args.size == (2,) and args.raw == b"\xff\x00" and content["numbers"] == rest["numbers"]
    assert [content[name].dtype for name in ("rng", "count", "many")] == ["uint8", "int64", "uint16"]
    assert content["ordered"] == {"a": 1}
    with pytest.raises(ValueError, match="rng is of type uint8"):
        stored_tensor(tmp_path / "a.pt", records, "rng", content["rng"])
    with pytest.raises(ValueError, match="ordered is not a tensor"):
        stored_tensor(tmp_path / "a.pt", records, "ordered", content["ordered"])


def test_what_is_written_is_what_is_read() -> None:
    numbers = [0, -1, 1 << 31, -(1 << 31) - 1, 1 << 200, -(1 << 200), 127, 128, -128, 1e-300, None, True, False]
    tensors = {
        "w": TensorEntry("data/0", "bfloat16", (2, 3), (3, 1)),
        "none": TensorEntry("data/1", "float32", (0,), (1,)),
    }
    records = {"data/0": 12, "data/1": 0}
    value = {"args": Namespace(a="ä", b=(1, (2,)), c=[[], {}], d={"x": ()}), "numbers": numbers, "model": tensors}
    for data in (write_pickle(value), pickle.dumps({**value, "model": {}})):
        found = read_pickle(data, records)
        assert found["args"] == value["args"] and found["numbers"] == numbers
        assert list(map(type, found["numbers"])) == list(map(type, numbers))
    assert read_pickle(write_pickle(value), records)["model"] == tensors


class _Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def _by_name(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls `name` of `module`, dotted names too, with a text."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
    return b"\x80\x04" + words + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_planted_code_is_refused_by_name(tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    marker = "planted"
    planted = [
        pickle.dumps(_Calls(os.mkdir, marker), protocol),
        pickle.dumps({"args": Namespace(x=[_Calls(eval, f"__import__('os').mkdir('{marker}')")])}, protocol),
        pickle.dumps(_Calls(getattr, Namespace, "__init__"), protocol),
        _by_name("os", "mkdir", marker),
        _by_name("argparse", "Namespace.__init__.__globals__", marker),
        _by_name("argparse", "_sys.modules.clear", marker),
        _by_name("torch", "serialization.os.mkdir", marker),
        _by_name("torch", "float.__class__", marker),
        _by_name("megatron.core.atomic_files", "os.mkdir", marker),
        _by_name("collections", "OrderedDict.fromkeys", marker),
    ]
    for data in planted:
        if b"megatron." in data:
            assert type(read_pickle(data, {})).__init__ is not os.mkdir  # a placeholder that does nothing
            continue
        with pytest.raises(pickle.UnpicklingError, match="GLOBAL" if protocol or data[:1] != b"(" else "operation"):
            read_pickle(data, {})
    assert os.listdir(tmp_path) == []
    if protocol == 2:
        pickle.loads(planted[0])
        assert os.listdir(tmp_path) == [marker], "the payload of this test does nothing"


def test_classes_of_this_process_cannot_be_altered() -> None:
    """A pickle may set attributes of what it names."""
    state = b"(N}(X\x05\x00\x00\x00titleX\x03\x00\x00\x00badutb."
    for name in (b"cargparse\nNamespace\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_parameter\n"):
        with contextlib.suppress(pickle.UnpicklingError):
            read_pickle(b"\x80\x02" + name + state, {})
        assert not hasattr(argparse.Namespace, "title") and not hasattr(OrderedDict, "title")
    assert "torch._utils" in sys.modules and not hasattr(torch._utils._rebuild_parameter, "title")


def test_types_are_changed_as_torch_does() -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        float("inf"),
        float("-inf"),
        65504.0,
        65520.0,
        1e-8,
        6e-8,
        3.4e38,
        1e39,
        1e-46,
        1.00390625,
    ]
    halfway = (torch.arange(1 << 12, dtype=torch.int32) * 0x3801 + 0x3F000000).view(torch.float32)
    values = torch.cat([torch.tensor(special, dtype=torch.float64), halfway.double(), torch.randn(1000).double()])
    for source in STORED_AS:
        tensor = values.to(getattr(torch, source))
        for target in STORED_AS:
            expected, found = tensor.to(getattr(torch, target)), cast(from_torch(tensor), source, target)
            assert found.dtype == STORED_AS[target] and np.array_equal(found, from_torch(expected), equal_nan=True)
            assert torch.equal(to_torch(found, target), expected)
        nan = cast(from_torch(torch.tensor([float("nan")]).to(getattr(torch, source))), source, "bfloat16")
        assert to_torch(nan, "bfloat16").isnan().all()
