"""Looks at a machine and says what would keep training from running, or from running fast, and what to do about it.

Every line is ok, a warning or a problem, the last two with a remedy. Under torchrun every machine is looked at, and the
processes of all machines exchange tensors. Ends with status 1 if there is a problem.

Examples:
  python tools/doctor.py --folder /shared/checkpoints
  python tools/doctor.py --device cpu --processes 4
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 tools/doctor.py
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from tools.doctor_checks import folder, hardware, network, software
from tools.doctor_checks.finding import Finding, ok, problem, warning
from tools.run_tool import parsed, positive, run_tool, tool_parser

_PATIENCE = timedelta(seconds=120)
_CLOCKS_APART = 5.0


def machine_findings(device: str, checkpoints: Path, processes: int, *, several: bool) -> Iterator[Finding]:
    """All that concerns one machine, of `several`, that runs so many processes; in the order of the report."""
    yield from software.check_versions()
    yield from software.check_packages()
    yield from hardware.check_gpus(processes)
    yield from software.check_kernels(device)
    yield from software.check_variables()
    yield from hardware.check_limits(device == "cuda")
    yield from hardware.check_clock()
    yield from folder.check_folder(checkpoints)
    yield from network.check_name(several)


def all_machines(device: str, checkpoints: Path) -> list[Finding]:
    """The findings of every machine of a job that torchrun has started, on its first rank; nothing on the others."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    found: list[Finding] = []
    if local_rank == 0:
        found = list(machine_findings(device, checkpoints, local_size, several=world_size > local_size))
    if device == "cuda":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
        everyone: list[tuple[str, float, list[Finding]]] = [("", 0.0, [])] * world_size
        dist.barrier()
        dist.all_gather_object(everyone, (socket.gethostname(), time.time(), found))
        total = torch.tensor([float(rank + 1)], device=device)
        dist.all_reduce(total)
        right = total.item() == world_size * (world_size + 1) / 2
        dist.destroy_process_group()
    except RuntimeError as error:
        sentence = str(error).strip().partition("\n")[0]
        unconnected = problem("connection", f"{world_size} processes: {sentence}", "look at docs/clusters.md")
        return [*found, unconnected] if local_rank == 0 else []
    if rank:
        return []
    report = [
        each._replace(subject=f"{each.subject}@{host}") if world_size > local_size else each
        for host, _, findings in everyone
        for each in findings
    ]
    hosts = len({host for host, _, _ in everyone})
    clocks = [moment for _, moment, _ in everyone]
    apart = max(clocks) - min(clocks)
    if apart > _CLOCKS_APART:
        report.append(warning("clocks", f"{apart:.0f} s apart", "set them by the network (timedatectl set-ntp true)"))
    text = f"{world_size} processes on {hosts} machine{'s' * (hosts > 1)} add up their ranks over "
    library = "NCCL" if device == "cuda" else "gloo"
    if right:
        report.append(ok("connection", text + library))
    else:
        report.append(problem("connection", f"{text}{library} to {total.item():g}", "run make gpu on each machine"))
    return report


def examine(args: argparse.Namespace) -> int:
    """Prints the report and returns the exit status."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; without --device the report says why")
    checkpoints = Path(args.folder)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        found = all_machines(device, checkpoints)
        for finding in found:
            print(finding.line, flush=True)
    else:
        processes = args.processes or (torch.cuda.device_count() if device == "cuda" else 2)
        found = []
        for finding in machine_findings(device, checkpoints, processes, several=False):
            print(finding.line, flush=True)
            found.append(finding)
        for finding in network.check_collectives(device, processes):
            print(finding.line, flush=True)
            found.append(finding)
    counts = {kind: sum(finding.status == kind for finding in found) for kind in ("problem", "warning")}
    if found:
        print(", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts.items()), flush=True)
    return int(counts["problem"] > 0)


def main(argv: Sequence[str]) -> int:
    """Looks at this machine, or at all of a job."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--folder", default=".", help="where checkpoints are to go; 256 MiB are written there for a moment"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="what training is to run on (default: GPUs if any)")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="that talk to each other (default: one per GPU, 2 on a CPU)"
    )
    args = parsed(parser, argv)
    status: list[int] = []
    return run_tool(lambda: status.append(examine(args))) or sum(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
