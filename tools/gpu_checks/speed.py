"""Part: the benchmarks of the MoE layer and of the training step, against the peers that are installed."""

import re
from typing import NamedTuple

from tools.gpu_checks.session import GIB, Session, must_end_well

OURS = "this project"
GOALS = {"forward": 600.0, "forward and backward": 550.0, "training step": 480.0}
"""TFLOP/s on an H200."""
_LAYER_FLAGS = {
    "cuda": "--rounds 3 --experts 8 4 --tokens 4096 8192 16384",
    "cpu": "--rounds 1 --experts 4 --hidden-size 64 --ffn-hidden-size 128 --tokens 128",
}
# a layer of Mixtral 8x7B with its embedding and output layer, about 31 GB before activations
_STEP_FLAGS = {
    "cuda": "--dtype bfloat16 --num-layers 1 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--num-query-groups 8 --seq-length 4096 --micro-batch-size 2 --rounds 4 --one-by-one",
    "cpu": "--num-layers 1 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 "
    "--vocab-size 512 --seq-length 64 --rounds 1",
}
_STEP_GIB = 48
_SPREAD = r"\s+([\d.]+) \([\d.]+ to [\d.]+\)"
_LAYER_ROW = re.compile(rf"^({OURS}.*?)" + 2 * _SPREAD)
_OPERATIONS = re.compile(r"^single operations, (.*)")
_GRADIENT_ROW = re.compile(rf"^ +weight gradient, (\w+){_SPREAD} GFLOP/s")
_STEP_ROW = re.compile(rf"^{OURS} *{_SPREAD}\s+([\d.]+)")


class Rate(NamedTuple):
    """Of the fastest of this project's ways, in the unit that the benchmark prints."""

    what: str
    goal: str
    """Key in GOALS."""
    value: float


def read_layer_rates(output: str) -> list[Rate]:
    """Both rates at each number of experts and tokens that moe_layer.py has printed."""
    found: dict[str, list[tuple[float, float]]] = {}
    title = ""
    for line in output.splitlines():
        if re.match(r"\d+ experts, top \d+, \d+ tokens", line):
            title = line
        elif row := _LAYER_ROW.match(line):
            found.setdefault(title, []).append((float(row[2]), float(row[3])))
    rates = []
    for title, values in found.items():
        for number, goal in enumerate(("forward", "forward and backward")):
            rates.append(Rate(f"moe_layer.py, {title}", goal, max(value[number] for value in values)))
    return rates


def read_gradient_rates(output: str) -> list[tuple[str, str, float]]:
    """Shape, kernel and GFLOP/s of the weight gradients that moe_layer.py has printed."""
    rates, shape = [], ""
    for line in output.splitlines():
        if title := _OPERATIONS.match(line):
            shape = title[1]
        elif row := _GRADIENT_ROW.match(line):
            rates.append((shape, row[1], float(row[2])))
    return rates


def read_step_rate(output: str) -> list[Rate]:
    """What train_step.py has printed, in GFLOP/s there and in TFLOP/s here; empty if it was not done."""
    rows = [row for line in output.splitlines() if (row := _STEP_ROW.match(line))]
    return [Rate("train_step.py", "training step", float(row[2]) / 1e3) for row in rows[:1]]


def check_speed(session: Session) -> str:
    """Runs the benchmarks; goals that are not reached are said, and are no failure. Raises PartEnded if one fails."""
    device, part = session.device, session.part
    if session.machine.packages.get("transformers") is None:
        part.note("transformers is not installed: it is left out of the comparisons.")
    flags = _LAYER_FLAGS[device].split()
    layer = session.run(session.python("tools/benchmarks/moe_layer.py", "--device", device, *flags))
    part.listing("tools/benchmarks/moe_layer.py", layer.output)
    rates = read_layer_rates(layer.output)
    unit = "TFLOP/s" if device == "cuda" else "GFLOP/s"
    table = part.table("Goals, for an H200", "what", "of", unit, "goal TFLOP/s", "")
    for rate in rates:
        table.add(rate.what, rate.goal, f"{rate.value:.1f}", *_judged(rate, device))
    gradients = part.table("Weight gradients of all experts, by kernel", "shape", "kernel", "TFLOP/s")
    for shape, kernel, gflops in read_gradient_rates(layer.output):
        gradients.add(shape, kernel, f"{gflops / 1e3:.3g}")
    must_end_well(layer)
    if device == "cuda" and session.machine.gpus[0]["free"] < _STEP_GIB * GIB:
        part.note(f"train_step.py is left out: it needs {_STEP_GIB} GiB of free memory at the size of 8x7B.")
    else:
        flags = _STEP_FLAGS[device].split()
        step = session.run(session.python("tools/benchmarks/train_step.py", "--device", device, *flags))
        part.listing("tools/benchmarks/train_step.py", step.output)
        for rate in read_step_rate(step.output):
            value = rate.value if device == "cuda" else 1e3 * rate.value
            table.add(rate.what, rate.goal, f"{value:.1f}", *_judged(rate, device))
            rates.append(rate)
        must_end_well(step)
    reached = sum(rate.value >= GOALS[rate.goal] for rate in rates)
    if device == "cpu":
        return f"both benchmarks ran ({len(rates)} rates); goals are for an H200"
    return f"{reached} of {len(rates)} rates reach the goals for an H200: " + ", ".join(
        f"{goal} {max(rate.value for rate in rates if rate.goal == goal):.0f} of {GOALS[goal]:.0f}"
        for goal in GOALS
        if any(rate.goal == goal for rate in rates)
    )


def _judged(rate: Rate, device: str) -> tuple[str, str]:
    if device == "cpu":
        return f"{GOALS[rate.goal]:.0f}", "not compared"
    return f"{GOALS[rate.goal]:.0f}", "reached" if rate.value >= GOALS[rate.goal] else "not reached"
