"""Python, torch, kernels and packages."""

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator

import torch

from megatron.core.fusions.forms import TABLE
from tools.doctor_checks.finding import Finding, ok, problem, warning
from tools.gpu_checks.probe import PACKAGES, version
from tools.show_forms import kernel_parts, without_kernel

OLDEST_PYTHON, OLDEST_TORCH, NEWEST_TORCH = (3, 10), (2, 11), (2, 13)
_NEEDED = {"numpy": "everything", "transformers": "tokenizers and conversion", "sentencepiece": "tokenizer.model files"}
_REINSTALL = "install the project again: pip install --no-build-isolation -e ."
# what they do that nobody wants in a training run that counts
_VARIABLES = {
    "TRITON_INTERPRET": ("problem", "kernels run in Triton's interpreter, very slowly"),
    "CUDA_LAUNCH_BLOCKING": ("warning", "the host waits for every kernel"),
    "TORCH_DISTRIBUTED_DEBUG": ("warning", "every collective is compared between the ranks"),
    "NCCL_P2P_DISABLE": ("warning", "GPUs of a machine do not use their links"),
    "NCCL_IB_DISABLE": ("warning", "machines do not use InfiniBand"),
}


def check_versions() -> Iterator[Finding]:
    """Those of Python and torch."""
    python = platform.python_version()
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield problem(
            "Python", python, f"make the environment with Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
        )
    else:
        yield ok("Python", python)
    found = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    if found < OLDEST_TORCH:
        yield problem("torch", text, f"install {'.'.join(map(str, OLDEST_TORCH))} or newer")
    elif found > NEWEST_TORCH:
        newest = ".".join(map(str, NEWEST_TORCH))
        yield warning("torch", text, f"newer than {newest}, the newest that was tried: run the tests first (make test)")
    else:
        yield ok("torch", text)


def check_packages() -> Iterator[Finding]:
    """What is needed, and that the optional accelerators of other toolkits are not."""
    for package, use in _NEEDED.items():
        found = version(package, PACKAGES[package])
        yield ok(package, found) if found else problem(package, f"missing, needed for {use}", _REINSTALL)
    engine = version("transformer-engine", "transformer_engine")
    yield ok("TE", f"Transformer Engine {engine or 'is not installed'}; nothing here needs it")
    apex = version("apex", "apex")
    if apex and not _is_of_nvidia():
        remedy = "pip uninstall apex, so that no program takes it for NVIDIA's"
        yield warning("apex", f"{apex} is the unrelated package of that name on PyPI", remedy)
    else:
        yield ok("apex", f"{apex or 'not installed'}; nothing here needs it")


def _is_of_nvidia() -> bool:
    """Whether the apex that is installed has parts that only NVIDIA's has."""
    try:
        return importlib.util.find_spec("apex.normalization") is not None
    except (ImportError, ValueError):
        return False


def check_kernels(device: str) -> Iterator[Finding]:
    """Which kernels run on this kind of device."""
    built_for, no_cpp, no_triton = kernel_parts()
    if no_cpp:
        yield warning("C++ kernels", f"missing ({no_cpp}): formulas in PyTorch run in their place, slower", _REINSTALL)
    else:
        yield ok("C++ kernels", f"built, for {built_for}")
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        yield warning("data index", "built by NumPy, slower, since its C++ part is missing", _REINSTALL)
    if device == "cuda" and no_triton:
        remedy = "install the triton that this torch asks for (pip show torch)"
        yield problem("Triton", f"its kernels do not run ({no_triton}): formulas run in their place", remedy)
    elif device == "cuda":
        yield ok("Triton", str(version("triton", "triton")))
    formulas = without_kernel(device)
    text = f"{len(TABLE) - len(formulas)} of {len(TABLE)} operations have a kernel on {device}"
    more = f", as formulas run {', '.join(formulas)}" if formulas else ""
    yield ok("operations", f"{text}{more} (python tools/show_forms.py says which and why)")


def check_variables() -> Iterator[Finding]:
    """Variables of the environment that were set to look for an error once."""
    for name, (status, text) in _VARIABLES.items():
        value = os.environ.get(name, "")
        if value not in ("", "0", "OFF"):
            yield Finding(status, "environment", f"{name}={value}: {text}", f"unset {name}")  # type: ignore[arg-type]
