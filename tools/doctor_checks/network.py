"""Whether processes reach each other: the name of this machine, and collectives with known results."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from tools.doctor_checks.finding import Finding, ok, problem, warning
from tools.gpu_checks.commands import TORCHRUN, run_together

_COLLECTIVES = Path(__file__).resolve().parents[1] / "gpu_checks" / "collectives.py"
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PATIENCE = 150.0


def check_name(several: bool) -> Iterator[Finding]:
    """That this machine's own name leads to an address, which gloo looks up; for `several` machines to a public one."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        if all(os.environ.get(variable) for variable in _INTERFACES):
            yield ok("host name", f"{name} leads to no address; interfaces are given by {' and '.join(_INTERFACES)}")
            return
        remedy = f"put it into /etc/hosts, or name the interface in {' and '.join(_INTERFACES)}"
        yield problem("host name", f"{name} leads to no address, and gloo looks for one", remedy)
        return
    if several and address.startswith("127.") and not os.environ.get(_INTERFACES[0]):
        text = f"{name} leads to {address}, where other machines do not reach it"
        yield warning("host name", text, f"name the interface in {' and '.join(_INTERFACES)}")
    else:
        yield ok("host name", f"{name} is {address}")


def check_collectives(device: str, processes: int) -> Iterator[Finding]:
    """Starts so many processes on this machine, which exchange tensors whose results are known."""
    library = "NCCL" if device == "cuda" else "gloo"
    command = [*TORCHRUN, "--nproc-per-node", str(processes), str(_COLLECTIVES), device]
    (ran,) = run_together([command], _PATIENCE)
    rows = [line.split("\t")[1:] for line in ran.output.splitlines() if line.startswith("collective\t")]
    if ran.status != 0 or not rows:
        text = f"{processes} processes: {ran.ending}" + (f" ({ran.last_words})" if ran.last_words else "")
        yield problem(library, text, "look at docs/clusters.md" + (", and set NCCL_DEBUG=INFO" * (device == "cuda")))
        return
    rates = ", ".join(f"{row[0]} {row[-1]} GB/s" for row in rows if row[0] in ("all_reduce", "all_to_all"))
    yield ok(library, f"{len(rows)} collectives of {processes} processes are right ({rates})")
