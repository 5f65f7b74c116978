"""Part: what this machine is, and which form of every operation runs on it."""

import os
import shutil

from tools.gpu_checks.session import GIB, PartEnded, Session, must_end_well

# Speeds of links and how GPUs are wired; the driver's version is in the first.
_NVIDIA_SMI = {
    "nvidia-smi": ("--query-gpu=index,name,driver_version,memory.total,memory.used,power.limit", "--format=csv"),
    "nvidia-smi topo -m": ("topo", "-m"),
    "nvidia-smi nvlink --status": ("nvlink", "--status"),
}


def check_environment(session: Session) -> str:
    """Lists versions, GPUs, links and kernels. Raises PartEnded if a GPU has no Triton."""
    machine, part = session.machine, session.part
    table = part.table("Versions", "what", "version")
    table.add("Python", machine.python)
    table.add("torch", f"{machine.torch}, CUDA {machine.cuda or 'not built in'}")
    table.add("NCCL", machine.nccl or "not asked, no GPU")
    table.add("system", machine.system)
    table.add("C compiler", machine.compiler or "none")
    table.add("Python.h", "there" if machine.python_headers else "missing")
    for package, version in machine.packages.items():
        table.add(package, version or "not installed")
    if machine.gpus:
        table = part.table("GPUs", "number", "name", "compute capability", "memory GiB", "free GiB")
        for number, gpu in enumerate(machine.gpus):
            sizes = (f"{gpu[kind] / GIB:.1f}" for kind in ("total", "free"))
            table.add(number, gpu["name"], gpu["capability"], *sizes)
    if shutil.which("nvidia-smi") is None:
        part.note("There is no nvidia-smi here: driver and links are unknown.")
    else:
        for title, arguments in _NVIDIA_SMI.items():
            ran = session.run(["nvidia-smi", *arguments], at_most=session.seconds_left / 4)
            part.listing(title, ran.output if ran.status == 0 else ran.ending)
    forms = must_end_well(session.run(session.python("tools/show_forms.py"))).output
    part.listing("tools/show_forms.py", forms)
    formulas = _without_kernel(forms, session.device)
    if formulas:
        part.note(f"On {session.device} these operations have no kernel and run as formulas: {', '.join(formulas)}.")
    if "TRITON_INTERPRET" in os.environ:
        part.note(
            f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} is set; the commands of this check run without it."
        )
    if session.device == "cuda":
        _check_triton(session)
    return f"{machine.line}; {len(formulas)} operations run as formulas"


def _without_kernel(forms: str, device: str) -> list[str]:
    """Operations for which show_forms names nothing but the formula on a device."""
    found, here = [], False
    for line in forms.splitlines():
        if line.startswith("on "):
            here = line.split()[1].rstrip(",") == device
        elif here and line.split()[1:] == ["the", "formula"]:
            found.append(line.split()[0])
    return found


def _check_triton(session: Session) -> None:
    machine = session.machine
    if machine.packages["triton"] is None:
        raise PartEnded("failed", "Triton is not installed: its kernels are replaced by formulas, which are slow")
    needed = {"a C compiler": machine.compiler, "Python.h": machine.python_headers}
    missing = [name for name, there in needed.items() if not there]
    if missing:
        session.part.note(
            f"Missing: {', '.join(missing)}. Triton compiles its launcher with a C compiler against Python.h; if its "
            "kernels fail below, install both (Debian: apt-get install gcc python3-dev)."
        )
