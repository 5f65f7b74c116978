"""Whole training steps on a CUDA device that is not there: no mix-up of devices, no wait of the host, a true dry run.

All jobs of a group run in one process, since torch has to be imported after the pretended device's helper.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import device_guard
import pytest

PROGRAM = Path(__file__).resolve().with_name("run.py")

MODEL = (
    "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1792 --num-attention-heads 8 --num-query-groups 2 "
    "--num-experts 8 --vocab-size 32000 --seq-length 512 --micro-batch-size 1 --tokenizer-type NullTokenizer "
    "--mock-data --train-iters 2 --moe-aux-loss-coeff 1e-2 --moe-grouped-gemm-backend grouped_mm"
)
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

# Where the host waits for the device, and how often in a step: at its end, and in each pass through an MoE layer.
AT_THE_END = {
    "copy to the host: training/logs/averages.py:average_over_ranks": 1,
    "number read: core/optimizer/clip_grads.py:gradient_norm": 1,
}
OF_COUNTS = ("copy to the host: core/transformer/moe/exchange.py:gather_counts",)
OF_ALL_TO_ALL = (*OF_COUNTS, "copy to the device: core/transformer/moe/token_dispatcher.py:_experts_of")
OF_DOCUMENTS = ("copy to the device: core/fusions/attention.py:from_bounds",)
OF_SHARE = ("copy to the device: training/training.py:_set_expert_share",)
OF_FALLBACK = ("fallback of grouped_mm: core/fusions/kernels/library/cuda.py:grouped_product",)
# Those that need no mark: the copies are from memory that is staged at once, the fallback is torch's own.
MEANT = {OF_ALL_TO_ALL[1], *OF_DOCUMENTS, *OF_FALLBACK}
PIECES = "event: core/optimizer/offload.py:_await"
PERSISTENT = "weight gradients by the persistent kernel"


class Layout(NamedTuple):
    """A job, and the waits it may have besides those at the end of a step."""

    flags: str
    waits: tuple[str, ...] = ()
    times: int = 0
    """How often each of them occurs."""


QUICK = {
    "plain": Layout("--bf16 --global-batch-size 1 --dry-run 0/1"),
    PERSISTENT: Layout("--bf16 --global-batch-size 2 --moe-grouped-wgrad-backend persistent --dry-run 0/1"),
    "TP2 PP2": Layout(f"--bf16 --global-batch-size 3 {TP2} {PP2} --dry-run 1/4"),
    "EP4 ETP1 with ZeRO": Layout(
        f"--bf16 --global-batch-size 8 {TP2} --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 {ZERO} "
        "--dry-run 5/8",
        OF_ALL_TO_ALL,
        4,
    ),
    "CP2": Layout("--bf16 --global-batch-size 1 --context-parallel-size 2 --dry-run 1/2"),
}
SLOW = {
    "TP2 PP2, last stage": Layout(f"--bf16 --global-batch-size 4 {TP2} {PP2} --dry-run 3/4"),
    "interleaved": Layout(
        f"--bf16 --global-batch-size 8 {PP2} --num-layers-per-virtual-pipeline-stage 1 --dry-run 0/2"
    ),
    "interleaved, last rank": Layout(
        f"--bf16 --global-batch-size 8 {PP2} --num-layers-per-virtual-pipeline-stage 1 --dry-run 1/2"
    ),
    "TP2 PP2 EP2": Layout(
        f"--bf16 --global-batch-size 8 {TP2} {PP2} --expert-model-parallel-size 2 --dry-run 0/8", OF_ALL_TO_ALL, 8
    ),
    "EP4 gathered": Layout(
        "--bf16 --global-batch-size 8 --expert-model-parallel-size 4 --moe-token-dispatcher-type allgather "
        "--dry-run 2/4",
        OF_COUNTS,
        8,
    ),
    "CP2 TP2": Layout(f"--bf16 --global-batch-size 2 {TP2} --context-parallel-size 2 --dry-run 0/4"),
    "ZeRO": Layout(f"--bf16 --global-batch-size 8 {ZERO} --dry-run 3/4"),
    "fp16": Layout("--fp16 --global-batch-size 2 --dry-run 0/1", OF_FALLBACK, 4 * 8),
    "float32": Layout("--global-batch-size 2 --dry-run 0/1", OF_FALLBACK, 4 * 8),
    "capacity": Layout("--bf16 --global-batch-size 2 --moe-expert-capacity-factor 1.5 --dry-run 0/1", OF_COUNTS, 8),
    "padded capacity, all-to-all": Layout(
        "--bf16 --global-batch-size 4 --moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity "
        "--expert-model-parallel-size 2 --dry-run 1/2",
        OF_ALL_TO_ALL,
        8,
    ),
    "full recomputation": Layout(
        "--bf16 --global-batch-size 2 --recompute-granularity full --moe-input-jitter-eps 0.01 --dry-run 0/1"
    ),
    "selective recomputation": Layout(
        f"--bf16 --global-batch-size 2 {TP2} --recompute-granularity selective "
        "--recompute-modules core_attn layernorm moe_act --dry-run 0/2"
    ),
    "jitter": Layout("--bf16 --global-batch-size 2 --moe-input-jitter-eps 0.01 --dry-run 0/1"),
    "documents": Layout(
        "--bf16 --global-batch-size 2 --reset-position-ids --reset-attention-mask --dry-run 0/1", OF_DOCUMENTS, 2
    ),
    "logits in pieces": Layout(
        "--bf16 --global-batch-size 1 --num-layers 1 --seq-length 8192 --max-position-embeddings 8192 --dry-run 0/1"
    ),
    "global balance": Layout(
        "--bf16 --global-batch-size 1 --moe-router-load-balancing-type global_aux_loss --dry-run 0/1", OF_SHARE, 1
    ),
    "gradients in bfloat16": Layout(f"--bf16 --global-batch-size 4 --grad-reduce-in-bf16 {ZERO} --dry-run 0/2"),
    "state on the host with ZeRO": Layout(
        f"--bf16 --global-batch-size 4 {ZERO} --num-layers 2 --optimizer-cpu-offload --dry-run 1/2", (PIECES,), 20
    ),
}
# What is planted, in which layout, and what is said of it.
FAULTS = {
    "index on the host": ("--dry-run 0/1", "rotary.py:rotate: aten.mul.Tensor of tensors on host and device"),
    "receives on the host": (
        f"{PP2} --dry-run 1/2",
        "p2p_communication.py:receive: .*recv_.* of a tensor on cpu",
    ),
    "shape by value": (
        "--dry-run 0/1",
        "transformer_layer.py:forward: what aten.index.Tensor returns depends on values",
    ),
    "unaligned rows": (
        "--dry-run 0/1",
        "rms_norm.py:rms_norm_forward: rms_norm._forward: x_ptr is not aligned to 16 bytes",
    ),
    "tall grid": ("--dry-run 0/1", r"permute._gather: grid \(1024, "),
    "descriptors of one thread": (
        "--moe-grouped-wgrad-backend persistent --dry-run 0/1",
        "Kernel requires a runtime memory allocation, but no allocator was set",
    ),
    "copies in turn": (
        "--num-layers 1 --vocab-size 3200 --optimizer-cpu-offload --dry-run 0/1",
        "offload.py:load: a copy that holds up the device",
    ),
    "strided message": (f"{TP2} --dry-run 0/2", r"mappings.py:all_gather_first: .* of strides \(1, "),
}
READ = "number read"
OFFLOAD = "--optimizer-cpu-offload --optimizer-offload-fraction"
HALF = "half of the state on the host"
PHASES = "--num-layers 2 --hidden-size 128 --ffn-hidden-size 384 --seq-length 64 --vocab-size 256 --eval-iters 2"
FEWER_LAYERS = "--num-layers 2"
"""Of the jobs of the default suite; the slow ones have four, in which stages hold several."""


def _watch(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    if reason := device_guard.obstacle():
        pytest.skip(reason)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json"],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def _jobs(layouts: dict[str, Layout], more: str = "") -> dict[str, dict[str, Any]]:
    return {name: {"flags": f"{MODEL} {more} {layout.flags}".split()} for name, layout in layouts.items()}


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Any]]:
    """What was seen of the layouts of the default suite, and of planted faults."""
    small = f"{MODEL} --bf16 --global-batch-size 1 {FEWER_LAYERS}"
    flags = {fault: flags for fault, (flags, _) in FAULTS.items()} | {READ: "--dry-run 0/1"}
    faults = {fault: {"flags": f"{small} {more}".split(), "plant": fault} for fault, more in flags.items()}
    half = {"flags": f"{small} --num-layers 1 --vocab-size 3200 --dry-run 0/1 {OFFLOAD} 0.5".split()}
    return _watch({**_jobs(QUICK, FEWER_LAYERS), **faults, HALF: half})


@pytest.fixture(scope="module")
def slow() -> dict[str, dict[str, Any]]:
    """What was seen of the others."""
    return _watch(_jobs(SLOW))


def _check(seen: dict[str, Any], layout: Layout) -> None:
    assert "error" not in seen, seen["error"]
    assert seen["waits"] == AT_THE_END | dict.fromkeys(layout.waits, layout.times)
    assert set(seen["unmarked"]) <= MEANT
    # torch's own memory: that of the step alone, since what lasts is most of the whole
    moving = seen["peak"] - seen["state"]
    assert abs(seen["predicted"] - seen["peak"]) < 0.01 * moving
    assert seen["launches"].keys() >= {"rms_norm._backward", "permute._combine", "swiglu._backward"}
    # two in each of two layers, for each of two microbatches
    persistent = seen["launches"].get("persistent_gradient._accumulate_persistently", 0)
    assert persistent == (2 * 2 * 2 if layout is QUICK[PERSISTENT] else 0)


@pytest.mark.parametrize("name", QUICK)
def test_a_step_of_a_pretended_gpu(name: str, quick: dict[str, dict[str, Any]]) -> None:
    _check(quick[name], QUICK[name])


def test_state_in_the_hosts_memory_is_updated_while_the_device_works(quick: dict[str, dict[str, Any]]) -> None:
    """Gradients come down and weights go up, and the host waits for pieces of them and for nothing else."""
    seen = quick[HALF]
    assert "error" not in seen, seen["error"]
    moved = seen["copies"]["copy to the host"] // 4
    assert seen["copies"]["copy to the device"] == 2 * moved
    # two pieces, of experts; for each the host waits for its gradients, and until other weights are out of its way
    assert seen["waits"] == AT_THE_END | {PIECES: 2 * 2} and not seen["unmarked"]
    assert seen["predicted"] == pytest.approx(seen["peak"], abs=0.01 * (seen["peak"] - seen["state"]))
    # 18 bytes a parameter but for those on the host, to an element of what parameters and memory are padded to
    elements = (seen["state"] + 12 * moved) / 18
    assert moved == pytest.approx(elements / 2, abs=64 + 10 * 512 / 18)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_step_of_a_pretended_gpu_in_other_layouts(name: str, slow: dict[str, dict[str, Any]]) -> None:
    _check(slow[name], SLOW[name])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, quick: dict[str, dict[str, Any]]) -> None:
    assert re.search(FAULTS[fault][1], quick[fault].get("error", "")), quick[fault]


def test_a_number_read_in_a_layer_is_counted(quick: dict[str, dict[str, Any]]) -> None:
    """In every norm: two in each of two layers, one at the end."""
    more = {
        f"{READ}: core/transformer/transformer_layer.py:_norm": 4,
        f"{READ}: core/transformer/transformer_block.py:forward": 1,
    }
    assert quick[READ]["waits"] == AT_THE_END | more
    assert quick[READ]["unmarked"] == sorted(more)


@pytest.mark.slow
def test_no_phase_of_a_run_takes_more_than_the_dry_run_says() -> None:
    """In both formats of checkpoints, also written in the background, whose copies are in the host's memory."""
    flags = f"{MODEL} {PHASES} --bf16 --global-batch-size 2 --dry-run 0/1".split()
    assert _watch({"run": {"flags": flags, "phases": True}}) == {"run": {"problems": []}}


@pytest.mark.slow
def test_flags_that_a_job_refuses() -> None:
    if reason := device_guard.obstacle():
        pytest.skip(reason)
    command = [sys.executable, str(PROGRAM), *MODEL.split(), "--dry-run", "4/4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --dry-run takes RANK/WORLD")
