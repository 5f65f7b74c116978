"""Headers of .safetensors files, indexes and configs that were damaged or made to do harm: a sentence, at once."""

import json
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion_testing import MakeModel
from safetensors.numpy import load_file, save_file

from tools.checkpoint import util
from tools.checkpoint.safetensors_header import read_header

Capture = pytest.CaptureFixture[str]
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    "empty": {"dtype": "F16", "shape": [0, 5], "data_offsets": [24, 24]},
}


def put(folder: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "a": {**GOOD["a"], **fields}}


def test_a_good_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    arrays = {f"t{number}": np.arange(number * 3, dtype="f4").reshape(-1, 3) for number in range(5)}
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "model.safetensors")
    expected = load_file(tmp_path / "model.safetensors")
    assert list(found) == sorted(expected)
    for name, stored in found.items():
        assert (stored.read() == expected[name]).all() and stored.shape == expected[name].shape
    assert list(read_header(put(tmp_path, json.dumps(GOOD).encode() + b"   "))) == ["a", "b", "empty"]


HOSTILE: dict[str, tuple[Any, str]] = {
    "length beyond the file": ((GOOD, bytes(24), 1 << 40), "its header is said to be of"),
    "length of all ones": ((GOOD, bytes(24), (1 << 64) - 1), "its header is said to be of"),
    "length too short": ((GOOD, bytes(24), 9), "is not JSON"),
    "cut": ((GOOD, bytes(23)), "but the file has 23 after the header"),
    "more data": ((GOOD, bytes(25)), "but the file has 25 after the header"),
    "not UTF-8": ((b'{"\xff": 1}',), "is not JSON"),
    "a list": (([],), "is not a JSON object"),
    "nested": (((b"[" + b" " * 12) * 100_000,), "nested too deeply"),
    "twice": ((b'{"a": 1, "a": 2}',), "names 'a' twice"),
    "field twice": ((b'{"a": {"dtype": "F32", "dtype": "F16"}}',), "names 'dtype' twice"),
    "overlap": ((changed(data_offsets=[4, 20]),), "begins at byte 4"),
    "second overlaps": (({**GOOD, "b": {**GOOD["b"], "data_offsets": [12, 20]}},), "ends at 16"),
    "a hole": (({**GOOD, "b": {**GOOD["b"], "data_offsets": [17, 25]}}, bytes(25)), "begins at byte 17"),
    "backwards": ((changed(data_offsets=[16, 0]),), "data_offsets [16, 0]"),
    "negative offset": ((changed(data_offsets=[-4, 12]),), "data_offsets [-4, 12]"),
    "one offset": ((changed(data_offsets=[16]),), "data_offsets [16]"),
    "offset of truth": ((changed(data_offsets=[False, 16]),), "data_offsets [False, 16]"),
    "huge offset": ((changed(data_offsets=[0, 1 << 70]),), "data_offsets [0, 1180"),
    "shape of another size": ((changed(shape=[2, 3]),), "is 24 bytes"),
    "negative shape": ((changed(shape=[-2, -2]),), "shape [-2, -2]"),
    "huge shape": ((changed(shape=[1 << 50] * 60),), "has shape [1125"),
    "many dimensions": ((changed(shape=[1] * 100),), "has shape [1, 1"),
    "fraction": ((changed(shape=[2.0, 2]),), "shape [2.0, 2]"),
    "NaN": ((b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',), "shape [nan]"),
    "shape is text": ((changed(shape="22"),), "shape '22'"),
    "dtype is a number": ((changed(dtype=7),), "the dtype of a is 7"),
    "unknown dtype": ((changed(dtype="Q4"),), "is of type Q4"),
    "field missing": (({**GOOD, "a": {"dtype": "F32"}},), "must have dtype"),
    "entry is null": (({**GOOD, "a": None},), "must have dtype"),
    "control characters": (({"\x1b]0;x\x07": GOOD["a"]},), r"\x1b]0;x\x07"),
    "half a character": ((b'{"\\ud800": 1}',), r"\ud800"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_is_wrong_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    path = put(tmp_path, *content)
    with pytest.raises(ValueError) as error:
        read_header(path)
    assert message in str(error.value) and str(path) in str(error.value)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_files_too_short_for_a_header(tmp_path: Path) -> None:
    for content in (b"", b"\0" * 7):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"the file has {len(content)}"):
            read_header(tmp_path / "model.safetensors")


BOMBS: dict[str, Callable[[Path], object]] = {
    "header of 100 MB": lambda folder: put(folder, b"[" + b"[]," * 33_000_000 + b"[]]"),
    "header of texts": lambda folder: put(folder, b'{"a":[' + b'"ab",' * ((8 << 20) // 5 - 10) + b"1]}"),
    "header of lists": lambda folder: put(folder, b'{"a":[' + b"[]," * ((8 << 20) // 3 - 10) + b"[]]}"),
    "sparse": lambda folder: _sparse(folder),
    "index of 100 MB": lambda folder: _index(folder, b'{"weight_map": {"a": "' + b"b" * 100_000_000 + b'"}}'),
    "config of lists": lambda folder: (folder / "config.json").write_bytes(
        b'{"num_hidden_layers": [' + b"[]," * 1_300_000 + b"[]]}"
    ),
}


def _sparse(folder: Path) -> None:
    path = put(folder, GOOD, length=1 << 39)
    with open(path, "r+b") as file:
        file.truncate(1 << 40)


def _index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(content)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_take_little_memory(copy_model: MakeModel, tmp_path: Path, name: str) -> None:
    """In a separate process, whose peak is read at its end."""
    folder = copy_model()
    BOMBS[name](folder)
    program = (
        "import sys; from tools.checkpoint import util; status = util.main(sys.argv[1:]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))); "
        "sys.exit(status)"
    )
    flags = f"--loader mixtral_hf --saver mixtral --load-dir '{folder}' --save-dir '{tmp_path}/m' --dry-run"
    done = subprocess.run([sys.executable, "-c", program, *shlex.split(flags)], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr[-2000:]
    assert len(lines[0]) < 500 and int(done.stdout) < 300 << 10


INDEXES: dict[str, tuple[Any, str]] = {
    "outside": ({"a": "../x.safetensors"}, "outside the folder"),
    "half a character": ({"a": "\ud800.safetensors"}, "outside the folder"),
    "missing shard": ({"a": "no.safetensors"}, "has no file no.safetensors"),
    "itself": ({"a": "."}, "is not a file"),
    "number": ({"a": 3}, "no weight_map from tensor names to file names"),
    "list": (["a"], "no weight_map"),
    "empty": ({}, "lists no tensors"),
    "long": ({"a": "x" * 300}, "File name too long"),
    "wrong place": ({"a": "one.safetensors"}, "but the index says: nowhere"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_wrong_is_refused(copy_model: MakeModel, tmp_path: Path, capsys: Capture, name: str) -> None:
    weight_map, message = INDEXES[name]
    folder = copy_model()
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert (
        util.main(shlex.split(f"--loader mixtral_hf --saver mixtral --load-dir '{folder}' --save-dir '{tmp_path}/m'"))
        == 1
    )
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error and len(error) < 1000


FIELDS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rope_theta", "rms_norm_eps", "vocab_size", "num_local_experts", "num_experts_per_tok", "max_position_embeddings",
    "sliding_window", "initializer_range",
)  # fmt: skip


@pytest.mark.parametrize("value", ['"x"', "[]", "{}", "true", "NaN", "-Infinity", "-1", "1" * 400, "1e30", "[[[1]]]"])
def test_numbers_of_a_config_that_are_none(copy_model: MakeModel, tmp_path: Path, capsys: Capture, value: str) -> None:
    folder = copy_model()
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 1e6, "rope_parameters": None}
    flags = shlex.split(
        f"--loader mixtral_hf --saver mixtral --load-dir '{folder}' --save-dir '{tmp_path}/m' --dry-run"
    )
    for field in FIELDS:
        (folder / "config.json").write_text(json.dumps(config | {field: json.loads(value)}))
        assert util.main(flags) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        names = (field, "init-method-std") if field == "initializer_range" else (field,)
        assert error.startswith("error: config.json") and any(name in error for name in names), error
        assert len(error) < 300
