"""The machine and the versions that a measurement belongs to."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def processor() -> str:
    """Name of the processor, as the system gives it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def machine(packages: Sequence[str], device: str | None = None) -> str:
    """Device (the processor if not given), cores, load, versions and commit."""
    versions = [f"Python {platform.python_version()}"]
    for name in packages:
        present = importlib.util.find_spec(name) is not None
        versions.append(f"{name} {importlib.metadata.version(name)}" if present else f"no {name}")
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{device or processor()}, {os.cpu_count()} cores{load}; {', '.join(versions)}; "
        f"commit {commit.stdout.strip() or 'unknown'}"
    )
