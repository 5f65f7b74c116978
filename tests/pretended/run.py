"""Runs two training steps and an evaluation of one rank on a CUDA device that is not there, and prints what it saw.

On a torch without CUDA, in any job that --dry-run takes: device mix-ups, launches that no device takes and messages of
wrong tensors end it with an error; it prints the peak of memory, what the host waits for, collectives and launches.
docs/dry_run.md says more.

Example:
  python tests/pretended/run.py <flags of pretrain_gpt.py> --dry-run 0/8
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import device_guard


def main(flags: list[str]) -> None:
    """Prints a report for the flags, or with --json a result for each job of a JSON object on standard input."""
    if not flags or flags[0] in ("-h", "--help"):
        print(f"{__doc__}\n  --json   jobs from standard input, {{name: {{flags: [...], plant: fault or null}}}}")
        return
    if reason := device_guard.obstacle():
        sys.exit(f"error: {reason}")
    try:
        device_guard.load()
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    # torch may only be imported from here on
    from pretended_step import report, run_jobs, watch_step

    if flags == ["--json"]:
        json.dump(run_jobs(json.load(sys.stdin)), sys.stdout)
        return
    try:
        print(report(watch_step(flags)))
    except (ValueError, AssertionError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
