"""Measures conversion both ways against `cp -r` of the same bytes on the same disk, and the memory it takes.

Example:
  PYTHONPATH=$(pwd) python tools/benchmarks/convert.py --folder /scratch --gigabytes 3 --repeats 3

Makes a Mixtral of random weights in bf16 in a temporary folder, copies and converts it in turn, to Megatron's `torch`
format and to Megatron-LM's `torch_dist` and back, and prints medians. The cache is warm: what a command reads is read
once before, and a first round does not count. What a command wrote is removed right before its next turn, then `sync`
runs. The tools have their output on disk when they end, cp has not, so its time with a `sync` after it is printed too.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.config import ModelConfig
from megatron.core.interchange.element_types import cast
from megatron.core.models.mixtral.hf_config import hf_config_from_model, hf_config_with_dtype
from tools.benchmarks.machine import ROOT
from tools.checkpoint.saver_mixtral_hf import ShardsWriter
from tools.checkpoint.stream import model_bytes
from tools.run_tool import parsed, tool_parser

MODEL = ModelConfig(
    num_layers=1, hidden_size=1024, ffn_hidden_size=3584, num_attention_heads=16, num_query_groups=8, vocab_size=32000,
    num_experts=8, rotary_base=1e6, max_position_embeddings=4096,
)  # fmt: skip


def make_model(folder: Path, nbytes: int) -> int:
    """Writes a Mixtral folder of at least `nbytes` bytes of random bf16 weights; returns their size."""
    layers = 4
    while model_bytes(replace(MODEL, num_layers=layers), "bfloat16") < nbytes:
        layers += 4
    model = replace(MODEL, num_layers=layers)
    folder.mkdir(parents=True)
    config = hf_config_from_model(model, sliding_window=None, bos=None, eos=None)
    (folder / "config.json").write_text(json.dumps(hf_config_with_dtype(config, "bfloat16")))
    noise = cast(np.random.default_rng(0).standard_normal(1 << 24, np.float32), "float32", "bfloat16")
    writer = ShardsWriter(model, "bfloat16", 10**9, avoid=None)
    writer.open(folder)
    for number, rule in enumerate(writer.rules):
        for rows in writer.chunks(rule):
            shape = (len(rows), *rule.shape[1:])
            writer.write(rule, rows, np.resize(noise[4099 * number % (1 << 16) :], shape))
    writer.check_complete()
    writer.write_index(folder)
    return model_bytes(model, "bfloat16")


class Cost(NamedTuple):
    """What a command takes."""

    seconds: float
    processor: float
    """Seconds of all cores, the kernel's for it included."""
    memory: int
    """Bytes that it or a child of it is resident with, at most."""


# A process of its own starts the command: what is started by a large one counts as at least as large.
_LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.call(sys.argv[1:], stdout=sys.stderr)
seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


def measure(command: Sequence[str]) -> Cost:
    """Runs a command. Raises RuntimeError with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        launched = [sys.executable, "-c", _LAUNCHER, *command]
        done = subprocess.run(launched, stdout=subprocess.PIPE, stderr=output, env=environment, check=True)
        status, seconds, processor, memory = json.loads(done.stdout)
        if status:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {output.read().decode(errors='replace')}")
    return Cost(seconds, processor, memory)


def to_megatron(source: Path, target: Path, sizes: Sequence[int]) -> list[str]:
    """The command that converts to Megatron's format at (tensor, pipeline, expert) parallel sizes."""
    return [
        sys.executable, str(ROOT / "tools/checkpoint/util.py"), "--loader", "mixtral_hf", "--saver", "mixtral",
        "--load-dir", str(source), "--save-dir", str(target), "--target-tensor-parallel-size", str(sizes[0]),
        "--target-pipeline-parallel-size", str(sizes[1]), "--target-expert-parallel-size", str(sizes[2]),
    ]  # fmt: skip


def to_torch_dist(source: Path, target: Path) -> list[str]:
    """The command that converts to Megatron-LM's torch_dist."""
    return [
        sys.executable, str(ROOT / "tools/checkpoint/util.py"), "--loader", "mixtral_hf", "--saver",
        "mixtral_torch_dist", "--load-dir", str(source), "--save-dir", str(target),
    ]  # fmt: skip


def to_huggingface(source: Path, config: Path, target: Path) -> list[str]:
    """The command that converts back, from either format."""
    return [
        sys.executable, str(ROOT / "tools/checkpoint/convert_megatron_to_hf_mixtral.py"), "--megatron-checkpoint-path",
        str(source), "--huggingface-config-path", str(config), "--huggingface-checkpoint-path", str(target),
    ]  # fmt: skip


def largest_rank_file(folder: Path) -> int:
    """Size of the largest `.pt` file of a checkpoint."""
    return max(path.stat().st_size for path in folder.rglob("*.pt"))


def _read_all(folder: Path) -> None:
    buffer = bytearray(1 << 22)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _round(work: Path, sizes: Sequence[int]) -> dict[str, Cost]:
    found: dict[str, Cost] = {}
    for name, source, target, command in (
        ("cp -r", "hf", "copy", ["cp", "-r", str(work / "hf"), str(work / "copy")]),
        ("to torch", "hf", "torch", to_megatron(work / "hf", work / "torch", sizes)),
        ("to torch_dist", "hf", "torch_dist", to_torch_dist(work / "hf", work / "torch_dist")),
        ("cp -r, then sync", "hf", "copy", ["sh", "-c", f"cp -r '{work / 'hf'}' '{work / 'copy'}' && sync"]),
        ("from torch", "torch", "back", to_huggingface(work / "torch", work / "hf", work / "back")),
        ("from torch_dist", "torch_dist", "back", to_huggingface(work / "torch_dist", work / "hf", work / "back")),
    ):
        _read_all(work / source)
        shutil.rmtree(work / target, ignore_errors=True)
        subprocess.run(["sync"], check=True)
        found[name] = measure(command)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurement."""
    parser = tool_parser(__doc__)
    parser.add_argument("--folder", help="folder on the disk to measure (default: the system's for temporary files)")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the model (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are printed (default: 3)")
    parser.add_argument(
        "--layout", type=int, nargs=3, default=[4, 2, 1], metavar=("TP", "PP", "EP"), help="sizes (default: 4 2 1)"
    )
    args = parsed(parser, argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        size = make_model(work / "hf", int(args.gigabytes * 1e9))
        rounds = [_round(work, args.layout) for _ in range(args.repeats + 1)][1:]
        bound = 1.25 * largest_rank_file(work / "torch") + 400e6
    tp, pp, ep = args.layout
    print(f"{size / 1e9:.2f} GB, TP {tp}, PP {pp}, EP {ep}, medians of {args.repeats}, memory of {bound / 1e6:.0f} MB:")
    for name in rounds[0]:
        costs = [found[name] for found in rounds]
        seconds, processor = (statistics.median(values) for values in list(zip(*costs, strict=True))[:2])
        ratio = statistics.median(found["cp -r"].seconds / found[name].seconds for found in rounds)
        print(
            f"{name:18} {seconds:6.2f} s  {size / seconds / 1e6:6.0f} MB/s  {ratio:5.2f} of cp -r, "
            f"{processor:.2f} s of processors, at most {max(cost.memory for cost in costs) / 1e6:.0f} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
