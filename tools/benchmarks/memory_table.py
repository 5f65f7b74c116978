"""Prints the table of docs/memory.md: for models and numbers of GPUs the cheapest flags with which a job fits.

Every row is what --suggest of a dry run says for a layout with as many expert-parallel ranks as there are experts, or
GPUs if these are fewer. No GPU is needed; all rows take some minutes.

Example:
  python tools/benchmarks/memory_table.py --models 8x7B --gpus 8 16
"""

import argparse
import subprocess
import sys
from pathlib import Path

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


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--gpus", nargs="+", type=int, default=[4, 8, 16, 64], help="numbers of GPUs")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of a GPU (default: 80)")
    arguments = parser.parse_args()
    for model in arguments.models:
        for gpus in arguments.gpus:
            print(f"{model} on {gpus} GPUs ...", file=sys.stderr, flush=True)
            try:
                print(row(model, gpus, arguments.memory), flush=True)
            except ValueError as error:
                sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
