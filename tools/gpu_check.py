"""The first hour on a GPU in one command: does everything run, are the numbers right, how fast is it.

Six parts run one after another, each in its own processes within its share of the time. A part that fails or takes
too long does not keep the next ones from running. After each part the report is rewritten, as report.md and
report.json. Nothing is installed and no network is used. Ends with status 1 if a part failed, and with 3 if none failed
but one was not finished in its share.
docs/gpu.md says what each part means.

Example:
  python tools/gpu_check.py                              # on a machine with GPUs, 8 minutes
  python tools/gpu_check.py --parts kernels numerics     # only these
  python tools/gpu_check.py --device cpu --minutes 3     # tries the check itself where there is no GPU
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.atomic_files import exclusive_folder
from tools.gpu_checks.conformance import check_kernels
from tools.gpu_checks.environment import check_environment
from tools.gpu_checks.example import check_example
from tools.gpu_checks.report import MARKDOWN, Part, Report
from tools.gpu_checks.session import Machine, PartEnded, Session, probe
from tools.gpu_checks.speed import check_speed
from tools.gpu_checks.training import check_layouts, check_numerics
from tools.run_tool import parsed, run_tool, tool_parser

_PROBE_SECONDS = 60
_LEAST_SECONDS = 25


class Check(NamedTuple):
    """A part: what runs it, and its share of the time."""

    run: Callable[[Session], str]
    share: float
    title: str
    meaning: str


CHECKS = {
    "environment": Check(
        check_environment, 30, "Environment", "What this machine is, and which form of every operation runs on it."
    ),
    "kernels": Check(
        check_kernels, 110, "Kernels", "Every kernel and its gradients against the formula in float64, in each type."
    ),
    "numerics": Check(
        check_numerics, 60, "Numerics", "Three training steps of one small model on this device and on the CPU."
    ),
    "layouts": Check(
        check_layouts, 170, "Layouts", "Collectives with known results, and every layout against one process."
    ),
    "example": Check(
        check_example, 110, "The example's model", "Speed of training, and memory against what the dry run says."
    ),
    "speed": Check(
        check_speed, 110, "Benchmarks", "The MoE layer and a training step against their goals and against peers."
    ),
}


def run_part(check: Check, part: Part, device: str, machine: Machine, seconds: float) -> None:
    """Runs a part; however it ends, the part says so."""
    start = time.monotonic()
    part.status, part.share = "running", round(seconds, 1)
    try:
        part.sentence = check.run(Session(device, machine, part, seconds))  # type: ignore[arg-type]
        part.status = "passed"
    except PartEnded as ended:
        part.status, part.sentence = ended.status, str(ended)
    except Exception as error:  # a part that is wrong itself must not end the others
        part.status, part.sentence = "failed", f"{type(error).__name__}: {error}"
    finally:
        part.seconds = round(time.monotonic() - start, 1)


def check_gpu(args: argparse.Namespace) -> int:
    """Runs the parts and writes the report. Returns the exit status; raises ValueError without a GPU to check."""
    start = time.monotonic()
    folder = Path(args.output)
    machine = probe(min(_PROBE_SECONDS, 60 * args.minutes))
    if args.device == "cuda" and not machine.gpus:
        raise ValueError(
            f"torch {machine.torch} finds no GPU here (CUDA {machine.cuda or 'not built in'}): look at nvidia-smi, "
            "or try the check itself with --device cpu"
        )
    with exclusive_folder(folder):
        names = [name for name in CHECKS if name in args.parts]
        parts = {name: Part(name, CHECKS[name].title, CHECKS[name].meaning) for name in names}
        report = Report(args.device, machine.line, list(parts.values()), args.minutes)
        try:
            for number, name in enumerate(names):
                print(f"\n[{number + 1}/{len(names)}] {CHECKS[name].title}", flush=True)
                left = 60 * args.minutes - (time.monotonic() - start)
                share = CHECKS[name].share / sum(CHECKS[other].share for other in names[number:])
                seconds = max(left * share, min(_LEAST_SECONDS, left / 2))
                run_part(CHECKS[name], parts[name], args.device, machine, seconds)
                print(f"  {parts[name].words}: {parts[name].sentence}", flush=True)
                report.write(folder)
        except BaseException as error:
            report.interrupted = f"interrupted ({type(error).__name__})"
            for part in report.parts:
                if part.status == "running":
                    part.status = "interrupted"
            report.write(folder)
            raise
    print(f"\n{report.verdict}\n{folder / MARKDOWN}", flush=True)
    return report.status


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None
    if not 0 < number < 10_000:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 10000, got {text}")
    return number


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Runs the check."""
    parser = tool_parser(__doc__)
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for all parts together (default: 8)")
    parser.add_argument("--output", default="gpu_report", metavar="FOLDER", help="of the report (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries each part, small")
    parser.add_argument("--parts", nargs="+", choices=list(CHECKS), default=list(CHECKS), help="default: all")
    args = parsed(parser, argv)
    signal.signal(signal.SIGTERM, _stop)
    found: list[int] = []
    kept = f"interrupted; what was found until then is in {args.output}"
    status = run_tool(lambda: found.append(check_gpu(args)), interrupted=kept)
    return status or sum(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
