"""Bad input to the conversion tools: one sentence, a non-zero exit, nothing left that looks complete, nothing run."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion_testing import MakeModel
from safetensors.torch import load_file, save_file

from megatron.core.atomic_files import exclusive_folder
from megatron.core.interchange import load_torch, save_torch
from megatron.core.interchange.stored_tensor import StoredTensor, open_torch, stored_tensor
from megatron.core.models.mixtral.weights import mixtral_weights
from tools.checkpoint import convert_megatron_to_hf_mixtral, stream, util
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource
from tools.checkpoint.saver_mixtral import find_tokenizer
from tools.checkpoint.stream import CheckedSource, Progress, byte_size

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
Capture = pytest.CaptureFixture[str]


def convert(source: Path, target: Path, *more: str) -> int:
    return util.main(["--loader", "mixtral_hf", "--saver", "mixtral", "--load-dir", str(source),
                      "--save-dir", str(target), *more])  # fmt: skip


def export(source: Path, config: Path, target: Path, *more: str) -> int:
    return convert_megatron_to_hf_mixtral.main(
        ["--megatron-checkpoint-path", str(source), "--huggingface-config-path", str(config),
         "--huggingface-checkpoint-path", str(target), *more]
    )  # fmt: skip


def assert_refused(code: int, capsys: Capture, message: str, target: Path) -> None:
    """The tool failed with one line that says why, and its target does not exist."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and message in errors[0], errors
    assert not target.exists()
    assert not list(target.parent.glob(".*"))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(EXPERT), f"lacks {EXPERT}"),
        (lambda w: w.update({"model.layers.4.input_layernorm.weight": torch.ones(32)}), "model.layers.4.input"),
        (lambda w: w.update({EXPERT: torch.ones(24, 31, dtype=torch.bfloat16)}), EXPERT),
        (lambda w: w.update({EXPERT: w[EXPERT].float()}), EXPERT),
        (lambda w: w.update({EXPERT: w[EXPERT].to(torch.int8)}), "only floating types"),
        (lambda w: w.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 32)}), "remove one of them"),
    ],
    ids=["missing", "unknown", "shape", "mixed types", "quantized", "both spellings"],
)
def test_every_tensor_is_accounted_for(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, change: Callable[..., object], message: str
) -> None:
    source = copy_model()
    edit_weights(source, change)
    assert_refused(convert(source, tmp_path / "m"), capsys, message, tmp_path / "m")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target-tensor-parallel-size", "3"], "num-attention-heads (8)"),
        (["--target-tensor-parallel-size", "8"], "num-query-groups (4)"),
        (["--target-pipeline-parallel-size", "3"], "num-layers (4)"),
        (["--target-tensor-parallel-size", "0"], "must be positive"),
        (["--make-vocab-size-divisible-by", "0"], "must be positive"),
        (["--tokenizer-model", "/nowhere/tokenizer.model"], "no tokenizer /nowhere"),
    ],
)
def test_layouts_that_do_not_divide(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: list[str], message: str
) -> None:
    assert_refused(convert(make_model(), tmp_path / "m", *flags), capsys, message, tmp_path / "m")


def test_missing_sources(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    assert_refused(convert(tmp_path / "no", tmp_path / "m"), capsys, "no Hugging Face model folder", tmp_path / "m")
    (tmp_path / "empty").mkdir()
    assert_refused(convert(tmp_path / "empty", tmp_path / "m"), capsys, "config.json", tmp_path / "m")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "mixtral"')
    assert_refused(convert(tmp_path / "empty", tmp_path / "m"), capsys, "is not JSON", tmp_path / "m")
    assert_refused(export(tmp_path / "no", make_model(), tmp_path / "o"), capsys, "no checkpoint", tmp_path / "o")
    assert util.main(["--loader", "nothing", "--saver", "mixtral", "--load-dir", "a", "--save-dir", "b"]) == 2
    assert "loader_nothing.py" in capsys.readouterr().err
    assert util.main(["--loader", "../evil", "--saver", "mixtral", "--load-dir", "a", "--save-dir", "b"]) == 2


def test_targets_that_are_not_empty_stay_as_they_are(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "precious").write_text("x")
    assert convert(make_model(), target) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert os.listdir(target) == ["precious"]
    assert convert(make_model(), tmp_path / "good") == 0
    assert export(tmp_path / "good", make_model(), target) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert os.listdir(target) == ["precious"]


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "a\\b", ""])
def test_indexes_that_leave_the_folder(copy_model: MakeModel, tmp_path: Path, capsys: Capture, name: str) -> None:
    source = copy_model()
    outside = (source / "model.safetensors").rename(tmp_path / "outside.safetensors")
    name = str(outside) if name == "ABSOLUTE" else name
    index = {"weight_map": dict.fromkeys(load_file(outside), name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(convert(source, tmp_path / "m"), capsys, "outside the folder", tmp_path / "m")


def test_links_of_the_download_cache_are_followed(copy_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "models--x" / "snapshots").mkdir(parents=True)
    source = copy_model("models--x/snapshots/abc")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for file in list(source.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert convert(source, tmp_path / "m") == 0


def test_index_and_files_that_disagree(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = copy_model(form="sharded")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == files[0])
    for value, message in ((files[1], f"{name} is in"), (None, f"{name} is in"), ("no.safetensors", "no.safetensors")):
        weight_map = {**index["weight_map"], name: value}
        if value is None:
            del weight_map[name]
        path.write_text(json.dumps({"weight_map": weight_map}))
        assert_refused(convert(source, tmp_path / "m"), capsys, message, tmp_path / "m")
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "model.extra": files[0]}}))
    assert_refused(convert(source, tmp_path / "m"), capsys, "model.extra", tmp_path / "m")


def test_damaged_weights(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = copy_model()
    data = (source / "model.safetensors").read_bytes()
    for damaged in (data[:-100], b"garbage", b""):
        (source / "model.safetensors").write_bytes(damaged)
        assert_refused(convert(source, tmp_path / "m"), capsys, "model.safetensors", tmp_path / "m")


@pytest.mark.parametrize("chunk_bytes", [1 << 8, 1 << 23], ids=["in pieces", "whole"])
def test_an_altered_byte_of_a_rank_file_is_found(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    source = copy_model()
    assert convert(source, tmp_path / "m", "--target-tensor-parallel-size", "2") == 0
    path = tmp_path / "m" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    good = path.read_bytes()
    content, records = open_torch(path)
    for name in (
        "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "output_layer.weight",  # its last bytes are padding, which is not written
    ):
        stored = stored_tensor(path, records, name, content["model"][name])
        assert isinstance(stored, StoredTensor)
        start, size = stored.offset, stored.read().nbytes
        for place in (start, start + size // 2, start + size - 1):
            data = bytearray(good)
            data[place] ^= 1
            path.write_bytes(data)
            assert_refused(export(tmp_path / "m", source, tmp_path / "o"), capsys, "checksum of", tmp_path / "o")
    path.write_bytes(good)
    assert export(tmp_path / "m", source, tmp_path / "o") == 0


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("payload-ran",))


def test_planted_code_never_runs(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = copy_model()
    assert convert(source, tmp_path / "good") == 0
    torch.save({"model.norm.weight": _Payload()}, source / "pytorch_model.bin")
    (source / "model.safetensors").rename(tmp_path / "aside")
    assert_refused(convert(source, tmp_path / "m"), capsys, "never run", tmp_path / "m")
    path = tmp_path / "good" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_torch(path)
    content["args"].planted = _Payload()
    torch.save(content, path)
    assert_refused(export(tmp_path / "good", source, tmp_path / "o"), capsys, "never run", tmp_path / "o")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-parallel-size", "4", "--pipeline-parallel-size", "2"], "was saved at tensor-parallel size 2"),
        (
            ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "1"],
            "not at tensor x pipeline x expert parallel sizes 2 x 1 x 1",
        ),
        (["--iteration", "7"], "has no step 7; it has: release"),
    ],
)
def test_wrong_layout_or_step_of_a_checkpoint(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: list[str], message: str
) -> None:
    layout = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert convert(make_model(), tmp_path / "m", *layout) == 0
    assert_refused(export(tmp_path / "m", make_model(), tmp_path / "o", *flags), capsys, message, tmp_path / "o")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.layers.1.mlp.router.weight"), "lacks decoder.layers.1.mlp.router.weight"),
        (lambda w: w.update({"decoder.layers.2.x": torch.ones(1)}), "decoder.layers.2.x"),
        (lambda w: w.update({"decoder.final_layernorm.weight": torch.ones(31)}), "decoder.final_layernorm.weight"),
        (lambda w: w["decoder.layers.1.mlp.router.weight"].add_(1), "differs between ranks"),
    ],
    ids=["missing", "unknown", "shape", "copies differ"],
)
def test_every_megatron_tensor_is_accounted_for(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, change: Callable[..., object], message: str
) -> None:
    layout = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert convert(make_model(), tmp_path / "m", *layout) == 0
    path = tmp_path / "m" / "release" / "mp_rank_01_001" / "model_optim_rng.pt"
    content = load_torch(path)
    change(content["model"])
    save_torch(path, content)
    assert_refused(export(tmp_path / "m", make_model(), tmp_path / "o"), capsys, message, tmp_path / "o")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"vocab_size": 151}, "vocab_size is 151"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope theta"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_config_of_another_model(
    make_model: MakeModel, copy_model: MakeModel, tmp_path: Path, capsys: Capture, change: dict, message: str
) -> None:
    assert convert(make_model(), tmp_path / "m") == 0
    config = copy_model()
    edit_config(config, **change)
    assert_refused(export(tmp_path / "m", config, tmp_path / "o"), capsys, message, tmp_path / "o")


@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_in_the_middle_leaves_nothing(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    assert convert(make_model(), tmp_path / "good") == 0
    read = HuggingFaceSource.read
    calls = 0

    def fails_late(self: HuggingFaceSource, *arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 50:
            raise OSError("No space left on device")
        return read(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(HuggingFaceSource, "read", fails_late)
    for saver in ("mixtral", "mixtral_hf"):
        target, calls = tmp_path / saver, 0
        if existed:
            target.mkdir()
        code = util.main(
            ["--loader", "mixtral_hf", "--saver", saver, "--load-dir", str(make_model()), "--save-dir", str(target)]
        )
        assert code == 1 and "No space left" in capsys.readouterr().err
        assert (os.listdir(target) == []) if existed else not target.exists()
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("saver", ["mixtral", "mixtral_hf"])
@pytest.mark.parametrize("folder", ["/proc/model", "/dev/null/model"])
def test_a_folder_that_cannot_be_made(make_model: MakeModel, capsys: Capture, saver: str, folder: str) -> None:
    command = f"--loader mixtral_hf --saver {saver} --load-dir '{make_model()}' --save-dir {folder}"
    assert util.main(shlex.split(command)) == 1
    assert capsys.readouterr().err.count(f"error: {folder} cannot be made: ") == 1


def test_parts_read_twice_or_never_are_noticed(make_model: MakeModel) -> None:
    source = CheckedSource(HuggingFaceSource(make_model()), Progress("", 1))
    rules = list(mixtral_weights(source.description.model))
    for rule in rules[:-1]:
        source.read(rule, range(rule.shape[0]))
    with pytest.raises(ValueError, match=r"output_layer\.weight was not read completely"):
        source.check_complete()
    source.read(rules[-1], range(75))
    with pytest.raises(ValueError, match=r"output_layer\.weight was not read completely: 75 rows"):
        source.check_complete()
    for rows in (range(75), range(80, 150)):
        with pytest.raises(ValueError, match=f"rows {rows.start} to {rows.stop} are asked for after row 75"):
            source.read(rules[-1], rows)
    source.read(rules[-1], range(75, 150))
    source.check_complete()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2GiB", 2 * 2**30), ("7", 7)])
def test_byte_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


def test_tokenizer_by_its_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        find_tokenizer(str(tmp_path / "tokenizer.model"), None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    expected = ("Llama2Tokenizer", str(tmp_path / "tokenizer.model"))
    assert find_tokenizer(str(tmp_path / "tokenizer.model"), None) == expected
    assert find_tokenizer(str(tmp_path), None) == expected
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path / "tokenizer.model", tmp_path, tmp_path / "tokenizer.model.v1"):
        assert find_tokenizer(str(path), None) == ("PretrainedTokenizerFromHF", str(tmp_path))
    assert find_tokenizer(str(tmp_path / "tokenizer.model"), "Llama2Tokenizer") == expected
    assert find_tokenizer(None, "NullTokenizer") == ("NullTokenizer", None)


@pytest.mark.parametrize("converter", ["to_megatron", "to_huggingface"])
def test_two_conversions_into_one_folder_do_not_mix(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], converter: str
) -> None:
    source = make_model()
    megatron, target = tmp_path / "megatron", tmp_path / "target"
    command = f"--loader mixtral_hf --saver mixtral --load-dir '{source}' --save-dir"
    if converter == "to_megatron":
        staging = target / ".release.saving"
        arguments = [*shlex.split(command), str(target)]
    else:
        assert util.main([*shlex.split(command), str(megatron)]) == 0
        staging = tmp_path / ".target.saving"
        arguments = shlex.split(f"--loader mixtral --saver mixtral_hf --load-dir '{megatron}' --save-dir '{target}'")
        arguments += ["--huggingface-config-path", str(source)]
    with exclusive_folder(staging):
        (staging / "of-the-other-process").touch()
        assert util.main(arguments) == 1
        assert "another process is writing" in capsys.readouterr().err
        assert (staging / "of-the-other-process").exists()
    (staging / "of-the-other-process").unlink()
    assert util.main(arguments) == 0
