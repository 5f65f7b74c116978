"""Makes a torch without CUDA believe in one device, so that tensors that claim to be on it can be differentiated.

What is missing is a few lines of C++ (guard.cpp), compiled when they are first asked for. They have to be there before
torch is imported, so this module imports nothing of it.
"""

import ctypes
import hashlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    return Path(spec.origin).parent


def _compiler() -> list[str]:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), [])


def obstacle() -> str:
    """Why there can be no pretended device here; empty if there can."""
    if sys.platform != "linux":
        return "a pretended CUDA device needs Linux"
    version = runpy.run_path(str(_torch_folder() / "version.py"))
    if version.get("cuda") or version.get("hip"):
        return "this torch has real devices: a pretended one needs a build for CPUs"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: its kernels could not be launched"
    return "" if _compiler() else "there is no C++ compiler: install one or name it in CXX"


def load() -> None:
    """Compiles the helper, if no earlier call did, and loads it. Raises RuntimeError if it does not compile."""
    assert "torch" not in sys.modules, "the helper has to be loaded before torch is imported"
    torch = _torch_folder()
    version = runpy.run_path(str(torch / "version.py"))["__version__"]
    key = hashlib.sha256("\n".join((SOURCE.read_text(), version, str(torch))).encode()).hexdigest()[:16]
    library = _cache() / f"guard-{key}.so"
    if not library.exists():
        _compile(torch, library)
    ctypes.CDLL(str(library)).install()


def _cache() -> Path:
    """A folder of this user's that lasts, else a new one."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-mixtral"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there may be no home
        return Path(tempfile.mkdtemp())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp())


def _compile(torch: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
        for standard in ("c++20", "c++17"):  # torch's headers want the second, one day the first
            command = [*_compiler(), f"-std={standard}", "-shared", "-fPIC", f"-I{torch / 'include'}", str(SOURCE)]
            done = subprocess.run([*command, "-o", str(made), *libraries], capture_output=True, text=True)
            if done.returncode == 0:
                made.replace(library)  # whole or absent, also for another process that compiles it at this moment
                return
    raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
