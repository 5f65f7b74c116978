"""What is known before anything is written: the plan, the disk, the layout; and plugins of others."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conversion_testing import MakeModel

from megatron.core.interchange.torch_dist import CheckpointFolder
from tools.benchmarks import convert as benchmark
from tools.checkpoint import convert_megatron_to_hf_mixtral, util

Capture = pytest.CaptureFixture[str]
GB = 10**9
TESTS = (Path(__file__).parent, Path(__file__).parents[3])


def convert(source: Path, target: Path, flags: str = "", saver: str = "mixtral") -> int:
    command = f"--loader mixtral_hf --saver {saver} --load-dir '{source}' --save-dir '{target}' {flags}"
    return util.main(shlex.split(command))


def test_the_plan_accounts_for_every_byte(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = make_model()
    flags = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2 --target-expert-parallel-size 2"
    assert convert(source, tmp_path / "m", f"{flags} --dry-run") == 0
    plan = capsys.readouterr().out
    assert not (tmp_path / "m").exists()
    assert convert(source, tmp_path / "m", flags) == 0
    planned: dict[str, int] = {}
    for file, name, size in re.findall(r"    to   release/(\S+): (\S+?),.* ([\d,]+) bytes", plan):
        planned[f"{file}: {name}"] = int(size.replace(",", ""))
    written = {}
    for path in (tmp_path / "m" / "release").rglob("*.pt"):
        for name, tensor in torch.load(path, weights_only=False)["model"].items():
            written[f"{path.parent.name}/{path.name}: {name}"] = tensor.nbytes
    assert planned == written
    for line in (
        "decoder.layers.3.mlp.experts.local_experts.2.linear_fc1.weight [48, 32] bfloat16, 3,072 bytes",
        "    from model.safetensors: model.layers.3.block_sparse_moe.experts.2.w3.weight",
        "    to   release/mp_rank_01_001_001/model_optim_rng.pt: decoder.layers.1.mlp.experts.local_experts.0."
        "linear_fc1.weight, rows 12:24 and 36:48, 1,536 bytes",
    ):
        assert line in plan.splitlines()
    assert re.search(r"to write: 8 file\(s\), 0\.\d+ GB, the largest .* free on the disk of .*: [\d,.]+ GB", plan)


def test_the_plan_the_other_way(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    source = make_model()
    assert convert(source, tmp_path / "m", "--target-tensor-parallel-size 2") == 0
    flags = f"--megatron-checkpoint-path '{tmp_path}/m' --huggingface-config-path '{source}' --dry-run"
    before = sorted(os.listdir(tmp_path))
    assert (
        convert_megatron_to_hf_mixtral.main(
            [*shlex.split(flags), "--huggingface-checkpoint-path", str(tmp_path / "hf")]
        )
        == 0
    )
    plan = capsys.readouterr().out.splitlines()
    assert sorted(os.listdir(tmp_path)) == before
    assert "    from mp_rank_01/model_optim_rng.pt: decoder.layers.0.self_attention.linear_qkv.weight" in plan
    assert "    to   model.safetensors: lm_head.weight, rows 0:150, 9,600 bytes" in plan
    assert len([line for line in plan if line.startswith("    to ")]) == 4 * (4 + 2 + 1 + 4 * 3) + 3


@pytest.mark.parametrize("flags", ["", "--dry-run"])
def test_a_disk_that_is_too_small(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(GB, GB, 100_000))
    for saver in ("mixtral", "mixtral_hf"):
        assert convert(make_model(), tmp_path / "m", flags, saver) == 1
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1 and "0.00 GB free" in errors and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target-expert-parallel-size 3", "--num-experts (4) is not divisible by --target-expert-parallel-size (3)"),
        ("--target-expert-parallel-size 0", "must be positive"),
        ("--target-expert-tensor-parallel-size 2", "choose a size that divides the tensor-parallel size"),
        ("--target-pipeline-layers 2,1", "3 layers in all, but the model has 4"),
        ("--target-pipeline-layers 1,3 --target-pipeline-parallel-size 4", "lists 2 ranks"),
        ("--target-pipeline-layers 1,1,2 --target-decoder-last-pipeline-num-layers 2", "not both"),
        ("--target-pipeline-parallel-size 2 --target-decoder-first-pipeline-num-layers 4", "--target-decoder-first"),
        ("--target-pipeline-parallel-size 4 --target-num-virtual-stages-per-pipeline-rank 2", "virtual stages"),
    ],
)
def test_layouts_that_cannot_be(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: str, message: str
) -> None:
    assert convert(make_model(), tmp_path / "m", flags) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1 and message in errors and os.listdir(tmp_path) == []


def test_a_plugin_of_somebody_else_is_found_by_name(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "saver_listing.py").write_text(
        "from pathlib import Path\n"
        "from megatron.core.models.mixtral.weights import mixtral_weights\n"
        "def add_arguments(parser):\n"
        "    parser.add_argument('--rows', type=int, default=1000)\n"
        "def save(source, args):\n"
        "    lines = []\n"
        "    for rule in mixtral_weights(source.description.model):\n"
        "        rows = [source.read(rule, rows) for rows in rule.chunks(1, args.rows)]\n"
        "        lines.append(f'{rule.name} {sum(len(part) for part in rows)}\\n')\n"
        "    Path(args.save_dir).write_text(''.join(lines))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "plugins"))
    assert convert(make_model(), tmp_path / "list", "--rows 3", "listing") == 0
    assert "decoder.layers.0.self_attention.linear_qkv.weight 64\n" in (tmp_path / "list").read_text()
    namespace, parser = Namespace(), ArgumentParser()
    util.find_plugin("saver", "listing").add_arguments(parser)
    assert parser.parse_args([], namespace).rows == 1000
    with pytest.raises(
        ValueError, match=r"no saver 'torch_dist': .* ours are mixtral, mixtral_hf, mixtral_torch_dist$"
    ):
        util.find_plugin("saver", "torch_dist")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 1, 4)], ids=str)
def test_memory_stays_under_its_bound(tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    """3 GB: no more resident than 1.25 x the largest rank file + 400 MB, both ways."""
    size = benchmark.make_model(tmp_path / "hf", 3 * GB)
    assert size >= 3 * GB
    there = benchmark.measure(benchmark.to_megatron(tmp_path / "hf", tmp_path / "m", sizes)).memory
    bound = 1.25 * benchmark.largest_rank_file(tmp_path / "m") + 400e6
    assert there <= bound, f"{there / 1e6:.0f} MB to Megatron, {bound / 1e6:.0f} allowed"
    back = benchmark.measure(benchmark.to_huggingface(tmp_path / "m", tmp_path / "hf", tmp_path / "back")).memory
    assert back <= bound, f"{back / 1e6:.0f} MB to Hugging Face, {bound / 1e6:.0f} allowed"
    for name in ("hf", "m", "back"):
        shutil.rmtree(tmp_path / name)


@pytest.mark.slow
def test_torch_dist_takes_little_memory_whatever_it_is_cut_into(tmp_path: Path) -> None:
    """0.9 GB, of which one key holds more than half: no more resident than 400 MB, if that key is one chunk as well."""
    size = benchmark.make_model(tmp_path / "hf", GB // 2)
    write = "import sys; from pathlib import Path; from test_torch_dist import write_model; write_model("
    write += "Path(sys.argv[1]), Path(sys.argv[2]), tp=1, padded=32000, whole=True)"
    subprocess.run(
        [sys.executable, "-c", write, str(tmp_path / "hf"), str(tmp_path / "whole" / "release")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (benchmark.ROOT, *TESTS)))},
        check=True,
    )
    costs = {"written": benchmark.measure(benchmark.to_torch_dist(tmp_path / "hf", tmp_path / "cut"))}
    for name in ("cut", "whole"):
        assert max(tensor_bytes(tmp_path / name / "release").values()) > size / 2
        command = benchmark.to_huggingface(tmp_path / name / "release", tmp_path / "hf", tmp_path / "back")
        costs[name] = benchmark.measure(command)
        shutil.rmtree(tmp_path / "back")
    assert {name: cost.memory for name, cost in costs.items() if cost.memory > 400e6} == {}
    for name in ("hf", "cut", "whole"):
        shutil.rmtree(tmp_path / name)


def tensor_bytes(step: Path) -> dict[str, int]:
    """Bytes of everything that a torch_dist folder holds, in bfloat16, by its key."""
    checkpoint = CheckpointFolder(step)
    return {key: 2 * math.prod(checkpoint.shape(key)) for key in checkpoint.catalog.tensors}
