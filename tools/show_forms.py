"""Prints which form of every operation runs on this machine, and why the others do not.

An operation is a formula in PyTorch, for which kernels may stand in: Triton's, C++, or a library's. The table they are
chosen from is megatron/core/fusions/forms.py.

Example:
  python tools/show_forms.py
  python tools/show_forms.py --operation swiglu grouped_product
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.core.fusions.forms import TABLE
from megatron.core.fusions.kernels import DEVICES, Kernel, instruction_set, load
from tools.run_tool import parsed, run_tool, tool_parser

NAMES = {"triton": "Triton", "cpu": "C++", "library": "library"}
TYPES = (torch.float32, torch.bfloat16)
_WIDTH = max(map(len, TABLE)) + 2


def _name(kernel: Kernel) -> str:
    return NAMES[kernel.part.partition(".")[0]]


def _obstacle(kernel: Kernel, device: str) -> str:
    """Why a kernel cannot run on a device of this machine whatever the operands; empty if it can."""
    if DEVICES[kernel.part] != device:
        return f"runs on {DEVICES[kernel.part]}"
    module = load(kernel.module)
    return module if isinstance(module, str) else ""


def _line(operation: str, device: str) -> list[str]:
    """The kernels of an operation that can run, in the order they are asked, then those that cannot."""
    able = [kernel for kernel in TABLE[operation] if not _obstacle(kernel, device)]
    chain = []
    for kernel in able:
        types = [str(kind).removeprefix("torch.") for kind in TYPES if kind in kernel.types]
        conditions = [*([] if len(types) == len(TYPES) else types), *([kernel.words] if kernel.words else [])]
        chain.append(_name(kernel) + (f" ({'; '.join(conditions)})" if conditions else ""))
    lines = [f"  {operation:{_WIDTH}}" + ", else ".join([*chain, "the formula"])]
    absent = [f"{_name(kernel)}: {_obstacle(kernel, device)}" for kernel in TABLE[operation] if kernel not in able]
    return lines + [f"  {'':{_WIDTH}}  not {reason}" for reason in dict.fromkeys(absent)]


def without_kernel(device: str) -> list[str]:
    """Operations that can run as nothing but their formula on a device of this machine."""
    return [name for name, row in TABLE.items() if all(_obstacle(kernel, device) for kernel in row)]


def kernel_parts() -> tuple[str, str, str]:
    """What C++ kernels are built for, why there are none, and why there are none of Triton's; empty if all is well."""
    cpp, triton = load("cpu.wrapper"), load("triton.swiglu")
    return instruction_set(), cpp if isinstance(cpp, str) else "", triton if isinstance(triton, str) else ""


def report(operations: Iterable[str]) -> str:
    """For every kind of device here. Raises ValueError for an operation that there is not."""
    unknown = sorted(set(operations) - TABLE.keys())
    if unknown:
        raise ValueError(f"--operation {unknown[0]}: there is no such operation; choose from {' '.join(TABLE)}")
    built_for, no_cpp, no_triton = kernel_parts()
    lines = [f"torch {torch.__version__}; C++: {no_cpp or built_for}; Triton: {no_triton or 'installed'}"]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        lines.append(f"on {device}" + (f", {torch.cuda.get_device_name()}" if device == "cuda" else ""))
        for operation in operations:
            lines += _line(operation, device)
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Prints the report."""
    parser = tool_parser(__doc__)
    parser.add_argument("--operation", nargs="+", default=list(TABLE), metavar="NAME", help="only these (default: all)")
    args = parsed(parser, argv)
    return run_tool(lambda: print(report(args.operation)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
