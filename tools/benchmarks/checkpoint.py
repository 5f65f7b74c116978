"""How fast a rank saves and loads its part of a training checkpoint, compared with copying the same bytes.

Examples:
  PYTHONPATH=$(pwd) python tools/benchmarks/checkpoint.py --folder /scratch --gigabytes 2
  PYTHONPATH=$(pwd) python tools/benchmarks/checkpoint.py --folder /dev/shm --rounds 9

Everything is done in turns, several times; printed are medians, and the ratio to the copy of the same round. Files
are synced to the disk where they are written and come from the page cache where they are read.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.core.dist_checkpointing import CheckpointReader, TensorShard, snapshot, write_metadata, write_shards
from tools.run_tool import parsed, tool_parser

HIDDEN, FFN = 4096, 14336


def rank_state(size: int) -> list[TensorShard]:
    """Experts of a Mixtral 8x7B in bfloat16 with float32 masters and moments, about `size` bytes."""
    shards: list[TensorShard] = []
    total = expert = 0
    while total < size:
        shape = (HIDDEN, FFN)
        weight = torch.randn(shape, dtype=torch.bfloat16).view(-1)
        for kind in ("weight", "master", "exp_avg", "exp_avg_sq"):
            data = weight if kind == "weight" else weight.float()
            name = f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc2.weight"
            shards.append(TensorShard(kind=kind, name=name, shape=shape, data=data, partition_dim=1))
            total += data.nbytes
        expert += 1
    return shards


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def copy_synced(source: Path, target: Path) -> None:
    """`cp`, and the wait until the bytes are on the disk."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def measure(folder: Path, size: int, rounds: int) -> dict[str, tuple[list[float], str]]:
    """Seconds in each round, and what they are compared with, of every action, done in turns."""
    shards = rank_state(size)
    name = "rank_00000.safetensors"

    def save() -> None:
        written = write_shards(folder, 0, shards)
        write_metadata(folder, [written], iteration=1, arguments={}, state={})

    # memory that is in use already, as a model's is
    targets = [replace(s, data=torch.empty(s.data.numel(), dtype=s.data.dtype).zero_()) for s in shards]
    half = [replace(t, data=t.data[: t.data.numel() // 2], rank=1, size=2) for t in targets]

    def load(wanted: list[TensorShard]) -> None:
        with CheckpointReader(folder) as reader:
            for shard in wanted:
                reader.read_into(shard)

    def verify() -> None:
        with CheckpointReader(folder) as reader:
            reader.verify()

    save()
    copy, null = folder / "copy", Path(os.devnull)
    actions: dict[str, tuple[Callable[[], object], str]] = {
        "cp to the disk": (lambda: copy_synced(folder / name, copy), ""),
        "save": (save, "cp to the disk"),
        "snapshot (what --async-save waits for)": (lambda: snapshot(shards), "cp to the disk"),
        "read the file": (lambda: shutil.copyfile(folder / name, null), ""),
        "cp in memory": (lambda: shutil.copyfile(folder / name, copy), ""),
        "compare checksums": (verify, "cp in memory"),
        "load at the same layout": (lambda: load(targets), "cp in memory"),
        "load as rank 1 of TP=2, cut by columns (half the bytes)": (lambda: load(half), "cp in memory"),
    }
    times: dict[str, list[float]] = {what: [] for what in actions}
    for _ in range(rounds):
        for what, (action, _base) in actions.items():
            times[what].append(seconds(action))
    return {what: (times[what], base) for what, (_, base) in actions.items()}


def main() -> int:
    """Measures and prints a table."""
    parser = tool_parser(__doc__)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write (default: %(default)s)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the rank's state (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: 5)")
    args = parsed(parser)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        results = measure(Path(folder), int(args.gigabytes * 1e9), args.rounds)
        size = (Path(folder) / "rank_00000.safetensors").stat().st_size
    print(f"{size / 1e6:.0f} MB, {args.rounds} rounds, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| | seconds | MB/s of the file | time / time of the copy |\n|---|---|---|---|")
    for what, (times, base) in results.items():
        median, ratio = statistics.median(times), ""
        if base:
            ratio = f"{statistics.median(a / b for a, b in zip(times, results[base][0], strict=True)):.2f} ({base})"
        print(f"| {what} | {median:.2f} | {size / 1e6 / median:.0f} | {ratio} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
