"""Triton's kernels compiled for GPUs that are not there: shared memory, registers, tensor cores, variants."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("kernel_compilation.py")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What a block may have at most, by compute capability."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

SPILLS = {
    # behind the loop over rows, where a tile of the main gradient joins as many sums; the loop itself has none
    ("grouped_gemm._accumulate_weight_gradient", 80): 240,
    ("grouped_gemm._accumulate_weight_gradient", 90): 192,
    ("grouped_gemm._accumulate_weight_gradient", 100): 520,
    # one 64-bit number, of a width of 4096 in 16 bits
    ("rms_norm._backward", 100): 8,
}
"""Bytes of a thread that may be spilled, by kernel and compute capability; nothing else may."""

PERSISTENT = "persistent_gradient._accumulate_persistently"
REGISTERS = 168
"""Of a thread of the persistent kernel: what 65,536 leave to 12 warps, of which 4 only load and multiply on a B200."""


def _compile(capability: int, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), str(capability), *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (PROGRAM.parents[2], PROGRAM.parents[1]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _faults(kernel: dict[str, Any], capability: int) -> list[str]:
    """What is wrong with a compiled kernel."""
    faults = []
    if kernel["shared"] > SHARED_BYTES[capability]:
        faults.append(f"{kernel['shared']} bytes of shared memory")
    if kernel["spilled"] > SPILLS.get((kernel["kernel"], capability), 0):
        faults.append(f"{kernel['spilled']} bytes of spilled registers")
    multiplies = kernel["kernel"].startswith("grouped_gemm.") and kernel["dtype"] in ("bfloat16", "float16")
    multiplies |= kernel["kernel"] == PERSISTENT
    if multiplies and TENSOR_CORES[capability] not in kernel["tensor_cores"]:
        faults.append(f"products without {TENSOR_CORES[capability]}")
    if kernel["kernel"] == PERSISTENT:
        if kernel["registers"] > REGISTERS:
            faults.append(f"{kernel['registers']} registers")
        if kernel["loops"] != 1:
            faults.append("the loads of the next tile wait for this one's end: its loops were not flattened")
        if kernel["loads"] != 2 or kernel["descriptors"] not in (["add", "load"], ["load", "store"]):
            faults.append(f"{kernel['loads']} loads beside the ends of rows, TMA for {kernel['descriptors']} alone")
    return [f"{kernel['kernel']} of {kernel['model']} in {kernel['dtype']}: {fault}" for fault in faults]


def _assert_sound(found: dict[str, Any], capability: int) -> None:
    assert {kernel["target"] for kernel in found["compiled"]} == {f"sm_{capability}" + "a" * (capability >= 90)}
    assert not [fault for kernel in found["compiled"] for fault in _faults(kernel, capability)]
    forgotten = set(found["kernels"]) - {kernel["kernel"] for kernel in found["compiled"]}
    forgotten -= {PERSISTENT} if capability < 90 else set()
    assert not forgotten, f"launched in no step: {forgotten}"
    written = [tuple(kernel["descriptors"]) for kernel in found["compiled"] if kernel["kernel"] == PERSISTENT]
    assert set(written) == ({("add", "load"), ("load", "store")} if capability >= 90 else set())
    assert found["compiled_later"] == [], "compiled again for another number of tokens, in the middle of a run"


def test_kernels_of_large_models_fit_an_h100() -> None:
    _assert_sound(_compile(90, "--types", "bfloat16", "--models", "8x7B", "8x22B"), 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_of_all_models_fit(capability: int) -> None:
    _assert_sound(_compile(capability), capability)
