"""What a folder is, what goes along with the weights, and where it may be written: known before anything is."""

import errno
import json
import os
import re
import shlex
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conversion_testing import TOKENIZER, MakeModel, assert_same_tensors, disk_tensors
from safetensors.torch import load_file, save_file

from megatron.core.interchange import find_checkpoint, load_torch, save_torch
from tools.checkpoint import convert_megatron_to_hf_mixtral, loader_mixtral_hf, util
from tools.checkpoint.model_folder import companion_files

Capture = pytest.CaptureFixture[str]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def convert(source: Path, target: Path, flags: str = "", saver: str = "mixtral_hf", loader: str = "mixtral_hf") -> int:
    command = f"--loader {loader} --saver {saver} --load-dir '{source}' --save-dir '{target}' {flags}"
    return util.main(shlex.split(command))


def refusal(code: int, capsys: Capture) -> str:
    """The one sentence that a tool ended with."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1, errors
    return errors[0]


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which the rows of a weight are read."""

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(loader_mixtral_hf.HuggingFaceSource, "read", read)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "LoRA adapter"),
        ({"adapter_config.json": b"{}", "config.json": b"{}", "model.safetensors": b""}, "LoRA adapter"),
        ({"model.Q4_K_M.gguf": b"GGUF"}, "holds a GGUF"),
        ({"model.gguf": b"GGUF", "config.json": b"{}"}, "holds a GGUF"),
        ({"params.json": b"{}", "consolidated.00.pth": b""}, "Mistral's own format"),
        ({"consolidated.safetensors": b"", "config.json": b"{}"}, "Mistral's own format"),
        ({"models--a--b/snapshots/abc/config.json": b"{}"}, "models--a--b/snapshots/abc"),
        ({"snapshots/abc/config.json": b"{}", "blobs/x": b""}, "snapshots/abc"),
        ({"iter_0000001/__0_0.distcp": b""}, "torch.distributed.checkpoint"),
        ({"latest": b"global_step1", "global_step1/x.pt": b"", "zero_to_fp32.py": b""}, "DeepSpeed"),
        ({"checkpoint-500/config.json": b"{}", "trainer_state.json": b"{}"}, "checkpoint-N"),
        ({"latest_checkpointed_iteration.txt": b"release"}, "--loader mixtral"),
        ({"config.json": b"{}", "model.safetensors": LFS}, "git lfs pull"),
        ({"config.json": LFS, "model.safetensors": b""}, "git lfs pull"),
        ({"config.json": b"{}"}, "has no weights"),
    ],
)
@pytest.mark.parametrize("saver", ["mixtral", "mixtral_hf"])
def test_what_only_looks_like_a_model_is_named(
    tmp_path: Path, capsys: Capture, files: dict[str, bytes], message: str, saver: str
) -> None:
    for name, content in files.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(content)
    for flags in ("", "--dry-run"):
        assert message in refusal(convert(tmp_path / "source", tmp_path / "out", flags, saver), capsys)
    assert os.listdir(tmp_path) == ["source"]


def test_a_name_of_the_hub_and_a_file_are_no_folders(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    assert "downloaded first" in refusal(convert(Path("mistralai/Mixtral-8x7B"), tmp_path / "o"), capsys)
    file = make_model() / "model.safetensors"
    assert "give the model folder" in refusal(convert(file, tmp_path / "o"), capsys)
    (tmp_path / "x.gguf").touch()
    assert "holds a GGUF" in refusal(convert(tmp_path / "x.gguf", tmp_path / "o"), capsys)


@pytest.mark.parametrize("saver", ["mixtral", "mixtral_hf"])
@pytest.mark.usefixtures("no_reading")
def test_a_target_that_is_no_folder(make_model: MakeModel, tmp_path: Path, capsys: Capture, saver: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "loop").symlink_to("loop")
    for target, message in (("link", "is not an empty folder"), ("loop", "leads back to itself")):
        assert message in refusal(convert(make_model(), tmp_path / target, "", saver), capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"compression_config": {"format": "int-quantized"}},
        "quantize_config.json",
        "hf_quant_config.json",
    ],
    ids=str,
)
def test_quantization_is_said_before_any_tensor(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, change: dict[str, object] | str
) -> None:
    source = copy_model()
    if isinstance(change, str):
        (source / change).write_text("{}")
    else:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | change))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, source / "gptq_model-4bit.safetensors")
    for there in (True, False):
        if not there:
            (source / "model.safetensors").unlink()
        assert "use the unquantized model" in refusal(convert(source, tmp_path / "o"), capsys)


def test_a_type_that_is_not_supported_is_the_same_in_every_run(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    source = copy_model()
    tensors = load_file(source / "model.safetensors")
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()}, source / "model.safetensors")
    error = refusal(convert(source, tmp_path / "o"), capsys)
    assert f"{min(tensors)} in " in error and "F8_E4M3" in error and "unquantized" in error


def test_a_byte_order_mark_is_read_and_not_passed_on(copy_model: MakeModel, tmp_path: Path) -> None:
    source = copy_model(form="sharded")
    for name in ("config.json", "model.safetensors.index.json"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    assert convert(source, tmp_path / "o") == 0
    written = (tmp_path / "o" / "config.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads((source / "config.json").read_text(encoding="utf-8-sig"))


@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_links_that_the_user_made_are_followed(copy_model: MakeModel, tmp_path: Path, form: str) -> None:
    source, elsewhere = copy_model(form=form), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in list(source.iterdir()):
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    assert convert(source, tmp_path / "o") == 0
    plain = shutil.copytree(source, tmp_path / "plain")
    assert convert(plain, tmp_path / "o2") == 0
    assert_same_tensors(tmp_path / "o", disk_tensors(tmp_path / "o2"))
    for name, content in TOKENIZER.items():
        assert (tmp_path / "o" / name).read_bytes() == content and not (tmp_path / "o" / name).is_symlink()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "additional_chat_templates", "config.json"]
)
@pytest.mark.usefixtures("no_reading")
def test_a_link_to_nothing_is_named_first(copy_model: MakeModel, tmp_path: Path, capsys: Capture, name: str) -> None:
    source = copy_model()
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to("../blobs/gone")
    for flags in ("", "--dry-run"):
        error = refusal(convert(source, tmp_path / "o", flags), capsys)
        assert f"{name} is a link to ../blobs/gone, which is not there" in error
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.usefixtures("no_reading")
def test_weights_and_tokenizers_that_are_not_there_are_named(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    source = copy_model()
    (source / "tokenizer.model").write_bytes(LFS)
    for saver in ("mixtral", "mixtral_hf"):
        assert "tokenizer.model is a Git LFS pointer" in refusal(convert(source, tmp_path / "o", "", saver), capsys)
    (source / "tokenizer.model").unlink()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("gone")
    assert "model.safetensors is a link to gone" in refusal(convert(source, tmp_path / "o"), capsys)


def test_what_transformers_reads_comes_along_and_nothing_else(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture
) -> None:
    source = copy_model()
    taken = (
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "special_tokens_map.json", "added_tokens.json",
        "tokenizer.model.v3", "tokenizer.4.0.0.json", "spiece.model", "merges.txt", "custom_generate/generate.py",
        "tokenization_own.py", "helper_of_it.py",
    )  # fmt: skip
    left = (
        "trainer_state.json", "latest", "model.safetensors.bak", "weights.tar", "weights.npz", "README.md", ".hidden",
        "optimizer.pt", "consolidated.00.pth", "sub/tokenizer.json", "additional_chat_templates/old.txt",
        "training_args.bin", "._tokenizer.json", ".cache/huggingface/tokenizer.json",
    )  # fmt: skip
    for name in (*taken, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode())
    (source / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}')
    assert convert(source, tmp_path / "o", "--dry-run") == 0
    assert "additional_chat_templates/rag.jinja, 35 bytes" in capsys.readouterr().out
    assert convert(source, tmp_path / "o") == 0
    expected = {*taken, *TOKENIZER, "config.json", "generation_config.json", "model.safetensors"}
    assert files_in(tmp_path / "o") == expected
    assert all((tmp_path / "o" / name).read_bytes() == name.encode() for name in taken)
    (source / "tokenization_own.py").unlink()
    assert "has no file tokenization_own.py" in refusal(convert(source, tmp_path / "o2"), capsys)
    (source / "tokenizer_config.json").write_text("{}")
    assert not {name for name in companion_files(source) if name.endswith(".py")} - {"custom_generate/generate.py"}


def test_a_model_without_a_tokenizer_is_said(copy_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = copy_model()
    assert convert(source, tmp_path / "with", "--dry-run") == 0
    assert "no tokenizer" not in capsys.readouterr().err
    for name in ("tokenizer.json", "tokenizer.model"):
        (source / name).unlink()
    assert convert(source, tmp_path / "o", "--dry-run") == 0
    assert "has no tokenizer" in capsys.readouterr().err


def test_companions_count_on_the_disk(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, usage = copy_model(), namedtuple("usage", "total used free")
    with open(source / "tokenizer.json", "wb") as file:
        file.truncate(50_000_000)
    measured = []

    def disk_usage(path: Path) -> tuple[int, int, int]:
        measured.append(Path(path))
        return usage(10**9, 0, 40_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/real")
    (tmp_path / "new").symlink_to("disk/new")
    for target in ("link", "new"):
        assert "0.04 GB free, but 0.05 GB are needed" in refusal(convert(source, tmp_path / target), capsys)
    assert measured == [tmp_path / "disk" / "real", tmp_path / "disk"]


@pytest.mark.parametrize("saver", ["mixtral", "mixtral_hf"])
@pytest.mark.parametrize("target", ["link", "dangling", "empty"])
def test_a_target_is_filled_where_it_leads(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saver: str, target: str
) -> None:
    """A folder that is there may be a mount point: it is not renamed, and nothing is made next to it."""
    (tmp_path / "disk").mkdir()
    real = {"link": tmp_path / "disk" / "real", "dangling": tmp_path / "disk" / "new", "empty": tmp_path / "empty"}[
        target
    ]
    if target != "dangling":
        real.mkdir()
        (real / "lost+found").mkdir()
        if saver == "mixtral_hf":
            (real / ".saving" / "additional_chat_templates").mkdir(parents=True)  # of an attempt that was killed
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to("disk/real" if name == "link" else "disk/new")
    rename, moved = os.rename, []

    def record(old: object, new: object) -> None:
        moved.append(Path(str(new)))
        rename(old, new)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", record)
    monkeypatch.chdir(tmp_path)
    assert convert(make_model(), Path(target), "", saver) == 0
    if saver == "mixtral":
        assert find_checkpoint(real)[0] == real / "release"
    else:
        assert files_in(real) == {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors"}
        assert moved[-1] == (real if target == "dangling" else real / "config.json")
    assert not list(real.parent.glob(".*")) and not list(real.glob(".*")) and (tmp_path / "link").is_symlink()
    if target != "dangling":
        assert real not in moved and (real / "lost+found").is_dir()


def test_an_error_while_files_are_moved_up_leaves_the_folder_empty(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o").mkdir()
    rename = os.rename

    def failing(old: Path, new: Path) -> None:
        if Path(new).name == "config.json":
            raise OSError(errno.EIO, "Input/output error", str(new))
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    assert "config.json: Input/output error" in refusal(convert(make_model(), tmp_path / "o"), capsys)
    assert os.listdir(tmp_path / "o") == []


@pytest.mark.parametrize("saver", ["mixtral", "mixtral_hf"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hf", "is the folder that is read"),
        ("link", "is the folder that is read"),
        ("hf/out", "is inside the folder that is read"),
        ("link/deep/out", "is inside the folder that is read"),
        (".", "contains the folder that is read"),
    ],
)
@pytest.mark.parametrize("flags", ["", "--dry-run", "--params-dtype float16", "--keep-experts 0,1"])
@pytest.mark.usefixtures("no_reading")
def test_source_and_target_are_apart(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, saver: str, target: str, message: str, flags: str
) -> None:
    before = files_in(copy_model())
    (tmp_path / "link").symlink_to("hf")
    assert message in refusal(convert(tmp_path / "hf", tmp_path / target, flags, saver), capsys)
    assert files_in(tmp_path / "hf") == before


def test_source_and_target_of_an_export_are_apart(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    assert convert(make_model(), tmp_path / "m", saver="mixtral") == 0
    command = f"--megatron-checkpoint-path '{tmp_path}/m' --huggingface-config-path '{make_model()}'"
    for target, message in (("m", "is the folder"), ("m/hf", "is inside the folder"), ("m/release", "is inside")):
        flags = shlex.split(f"{command} --huggingface-checkpoint-path '{tmp_path / target}'")
        assert message in refusal(convert_megatron_to_hf_mixtral.main(flags), capsys)


def test_targets_are_judged_before_the_source_is_opened(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()

    def opened(*_: object) -> None:
        raise AssertionError("the source was opened")

    monkeypatch.setattr(loader_mixtral_hf, "open_source", opened)
    for saver in ("mixtral", "mixtral_hf"):
        assert "is not an empty folder" in refusal(convert(make_model(), tmp_path / "full", "", saver), capsys)
    assert "no tokenizer" in refusal(convert(make_model(), tmp_path / "o", "--tokenizer-model no", "mixtral"), capsys)


@pytest.mark.parametrize("form", ["single", "fused"])
@pytest.mark.parametrize("field", ["num_hidden_layers", "num_local_experts"])
def test_absurd_counts_are_refused_at_once(
    copy_model: MakeModel, tmp_path: Path, capsys: Capture, form: str, field: str
) -> None:
    source = copy_model(form=form)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, field: 10**12}))
    error = refusal(convert(source, tmp_path / "o", "", "mixtral"), capsys)
    assert f"{field} {10**12}, but there are tensors of 4" in error


def test_absurd_counts_of_a_megatron_checkpoint(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    assert convert(make_model(), tmp_path / "m", saver="mixtral") == 0
    path = tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = load_torch(path)
    content["args"].num_experts = 10**12
    save_torch(path, content)
    error = refusal(convert(tmp_path / "m", tmp_path / "o", "", "mixtral", "mixtral"), capsys)
    assert f"4 layers of {10**12} experts" in error


def test_a_model_folder_is_no_checkpoint(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = make_model()
    command = f"--loader mixtral_hf --saver mixtral --load-dir {shlex.quote(str(source))} "
    with pytest.raises(ValueError, match=re.escape(command)):
        find_checkpoint(source)
    flags = f"--huggingface-config-path '{source}'"
    error = refusal(convert(source, tmp_path / "o", flags, "mixtral_hf", "mixtral"), capsys)
    assert "is a Hugging Face model folder" in error
    (tmp_path / "release").mkdir()
    shutil.copytree(source, tmp_path / "release", dirs_exist_ok=True)
    assert "is a Hugging Face model folder" in refusal(
        convert(tmp_path / "release", tmp_path / "o", "", "mixtral", "mixtral"), capsys
    )
