"""Prints the table of docs/memory.md: for models and numbers of GPUs the cheapest flags with which a job fits.

Every row is what --suggest of a dry run says for a layout with as many expert-parallel ranks as there are experts, or
GPUs if these are fewer. No GPU is needed; all rows take some minutes.

Example:
  python tools/benchmarks/memory_table.py --models 8x7B --gpus 8 16
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.run_tool import parsed, positive, run_tool, tool_parser

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_gpt.py"
SEVEN = "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --num-query-groups 8"
MODELS = {
    "4x7B": (4, SEVEN),
    "8x7B": (8, SEVEN),
    "8x22B": (
        8,
        "--num-layers 56 --hidden-size 6144 --ffn-hidden-size 16384 --num-attention-heads 48 --num-query-groups 8",
    ),
}
RUN = "--vocab-size 32000 --bf16 --seq-length 4096 --micro-batch-size 1 --global-batch-size 256 --train-iters 1"


def row(model: str, gpus: int, memory: float) -> str:
    """Model, GPUs, what a rank needs, and flags. Raises ValueError with what the program said if it refuses the job."""
    experts, shape = MODELS[model]
    layout = f"--expert-model-parallel-size {min(experts, gpus)}"
    flags = f"{shape} --num-experts {experts} {RUN} {layout} --dry-run 0/{gpus} --suggest {memory}"
    done = subprocess.run([sys.executable, str(PROGRAM), *flags.split()], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if not lines or not lines[-1].startswith(("fits", "nothing")):
        raise ValueError(f"{model} on {gpus} GPUs: {done.stderr.strip() or done.stdout.strip()}")
    need = " ".join(lines[-2].partition(" GiB")[0].split())
    _, _, added = lines[-1].partition(": add ")
    flags = f"{layout} {added}" if lines[-1].startswith("fits") else "nothing that was tried is enough"
    return f"{model:5} on {gpus:2} GPUs  {need:>10} GiB  {flags}".rstrip()


def table(models: Sequence[str], gpus: Sequence[int], memory: float) -> None:
    """Prints the rows."""
    for model in models:
        for number in gpus:
            print(f"{model} on {number} GPUs ...", file=sys.stderr, flush=True)
            print(row(model, number, memory), flush=True)


def main(argv: Sequence[str]) -> int:
    """Prints the table."""
    parser = tool_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--gpus", nargs="+", type=positive, default=[4, 8, 16, 64], help="numbers of GPUs")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a GPU (default: 80)")
    args = parsed(parser, argv)
    return run_tool(lambda: table(args.models, args.gpus, args.memory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
