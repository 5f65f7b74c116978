"""Draws a pipeline schedule as text, with its bubble and its live microbatches.

Example:
  python tools/show_schedule.py --pp 4 --microbatches 8
  python tools/show_schedule.py --pp 4 --microbatches 8 --virtual 2
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.pipeline_parallel.schedules import Forward, Pipeline, program
from megatron.core.pipeline_parallel.simulation import simulate
from tools.run_tool import parsed, run_tool, tool_parser


def draw(pipeline: Pipeline, microbatches: int) -> str:
    """One line a rank, one column a unit of time; every pass takes one. Raises ValueError for a bad shape."""
    timed = simulate(pipeline, [program(pipeline, rank, microbatches) for rank in range(pipeline.ranks)])
    width = len(str(microbatches - 1)) + 2
    end = round(max(own[-1].end for own in timed))
    lines = []
    for rank, own in enumerate(timed):
        cells = ["."] * end
        for entry in own:
            letter = chr(ord("a") + entry.work.chunk)
            letter = letter if isinstance(entry.work, Forward) else letter.upper()
            cells[round(entry.start)] = f"{entry.work.microbatch}{letter}"
        lines.append(f"rank {rank}: " + "".join(cell.ljust(width) for cell in cells).rstrip())
    live = ", ".join(str(pipeline.peak_live(rank, microbatches)) for rank in range(pipeline.ranks))
    share = f"{pipeline.bubble_share(microbatches):.1%}"
    lines.append(
        f"number: microbatch; letter: chunk, small for forward and capital for backward passes; idle: {share} of the "
        f"computing time\nmost chunks alive on each rank: {live}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a schedule; returns the exit status."""
    parser = tool_parser(*str(__doc__).split("\n\n", 1))
    parser.add_argument("--pp", type=int, required=True, help="pipeline-parallel size")
    parser.add_argument("--microbatches", type=int, required=True, help="microbatches in a step")
    parser.add_argument("--virtual", type=int, default=1, help="chunks of layers on each rank (default: 1)")
    args = parsed(parser, argv)

    def show() -> None:
        if min(args.pp, args.microbatches, args.virtual) < 1 or args.virtual > 26:
            raise ValueError("--pp, --microbatches and --virtual must be positive, and --virtual at most 26")
        if args.pp == 1 and args.virtual > 1:
            raise ValueError("chunks of layers need --pp above 1")
        print(draw(Pipeline(args.pp, args.virtual), args.microbatches))

    return run_tool(show)


if __name__ == "__main__":
    sys.exit(main())
