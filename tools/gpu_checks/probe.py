"""Prints what this machine is as one line of JSON; a separate program, since a broken driver can make torch hang."""

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

# by the name they are installed under, and by the name they are imported as
PACKAGES = {
    "triton": "triton", "transformers": "transformers", "pytest": "pytest", "numpy": "numpy",
    "safetensors": "safetensors", "sentencepiece": "sentencepiece", "tokenizers": "tokenizers", "regex": "regex",
    "transformer-engine": "transformer_engine", "apex": "apex", "flash-attn": "flash_attn", "megatron-core": None,
}  # fmt: skip


def version(package: str, module: str | None) -> str | None:
    """That of a package, "installed" where it does not say; None without it.

    Megatron-Core is known by its package alone, since its module has the name of this project's.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "installed" if module is not None and importlib.util.find_spec(module) is not None else None


def compiler() -> str:
    """First line of what the C compiler says of itself; empty without one."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        return ""
    said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    return (said.splitlines() or [found])[0]


def describe() -> dict[str, object]:
    """Versions, GPUs (bytes of memory) and what Triton needs to compile."""
    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "total": total, "free": free})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else None  # type: ignore[no-untyped-call]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "system": platform.platform(),
        "gpus": gpus,
        "packages": {package: version(package, module) for package, module in PACKAGES.items()},
        "compiler": compiler(),
        "python_headers": Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        print(__doc__)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    print(json.dumps(describe()))
