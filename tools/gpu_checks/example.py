"""Part: the example script's model, with as many layers as fit one GPU: speed, and memory against the dry run's."""

import json
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_checks.commands import ROOT, Ran
from tools.gpu_checks.session import GIB, PartEnded, Session, must_end_well
from tools.gpu_checks.speed import GOALS

GOAL = GOALS["training step"]
_SCRIPT = "mixtral_4x7b_example.sh"
_STEPS, _MICROBATCHES = 5, 4
_WARM_UP = 2
# The libraries' own memory, fragmentation and kernels' workspaces: a fixed part and a share.
_RESERVE_GIB, _RESERVE_SHARE = 3.0, 0.04
_SETTINGS = (
    "HIDDEN_SIZE", "FFN_HIDDEN_SIZE", "NUM_ATTENTION_HEADS", "NUM_QUERY_GROUPS", "NUM_EXPERTS", "MOE_ROUTER_TOPK",
    "MOE_AUX_LOSS_COEFF", "SEQ_LENGTH", "MAX_POSITION_EMBEDDINGS", "ROTARY_BASE", "MICRO_BATCH_SIZE", "LR",
)  # fmt: skip
_CPU_SIZES = {
    "HIDDEN_SIZE": "128", "FFN_HIDDEN_SIZE": "448", "NUM_ATTENTION_HEADS": "4", "NUM_QUERY_GROUPS": "2",
    "SEQ_LENGTH": "128",
}  # fmt: skip
_VOCABULARY = {"cuda": 32000, "cpu": 512}
_ATTEMPTS = 3


@dataclass(frozen=True)
class Speed:
    """Medians over the steps that count."""

    tokens_per_second: float
    tflops: float
    step_seconds: float


def script_settings(session: Session) -> dict[str, str]:
    """The settings that the example script has if none are given, as its --help lists them."""
    ran = must_end_well(session.run(["bash", str(ROOT / _SCRIPT), "--help"]))
    line = next((line for line in ran.output.splitlines() if line.startswith("Settings: ")), "")
    found = dict(re.findall(r"([A-Z_]+)=(\S*)", line))
    missing = sorted({*_SETTINGS, "NUM_LAYERS"} - found.keys())
    if missing:
        raise PartEnded("failed", f"{_SCRIPT} --help lists no value of {', '.join(missing)}")
    return found | (_CPU_SIZES if session.device == "cpu" else {})


def model_flags(session: Session, settings: dict[str, str], layers: int) -> list[object]:
    """Flags of one process that trains the model with fewer layers."""
    shape = [word for name in _SETTINGS for word in (f"--{name.lower().replace('_', '-')}", settings[name])]
    return [
        "--num-layers", layers, *shape, "--global-batch-size", _MICROBATCHES * int(settings["MICRO_BATCH_SIZE"]),
        "--bf16", "--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", _VOCABULARY[session.device],
        "--train-iters", _STEPS, "--eval-iters", 0, "--eval-interval", 0, "--log-interval", 1, "--log-throughput",
    ]  # fmt: skip


def predicted_gib(session: Session, settings: dict[str, str], layers: int) -> float:
    """What the dry run says that a process needs. Raises PartEnded if it does not say it in a way known here."""
    words = session.python("pretrain_gpt.py", *model_flags(session, settings, layers), "--dry-run", "0/1")
    output = must_end_well(session.run(words)).output
    found = re.search(r"^\s*total\b[^\n]*?([\d.]+) GiB", output, re.MULTILINE)
    if found is None:
        raise PartEnded("failed", "the dry run printed no line of the total with a number of GiB")
    return float(found[1])


def most_layers(one: float, two: float, available: float, most: int) -> int:
    """Layers whose memory is at most `available`, all in GiB, from what one layer and two layers need."""
    return max(1, min(most, int((available - one) / (two - one) + 1e-6) + 1))


def read_speed(output: str, metrics: Path, tokens: int) -> Speed:
    """From the log lines and the metrics file; `tokens` is those of a step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    tflops = [float(number) for number in re.findall(r"TFLOP/s/GPU\): ([\d.]+)", output)]
    rate = statistics.median(rates[_WARM_UP:] or rates)
    return Speed(rate, statistics.median(tflops[_WARM_UP:] or tflops or [0.0]), tokens / rate)


def check_example(session: Session) -> str:
    """Finds the number of layers, trains, and compares. Raises PartEnded if nothing fits or runs."""
    settings = script_settings(session)
    one, two = (predicted_gib(session, settings, layers) for layers in (1, 2))
    available = 2 * two - one  # on a CPU that of three layers, to keep the trial short
    if session.device == "cuda":
        available = session.machine.gpus[0]["free"] / GIB * (1 - _RESERVE_SHARE) - _RESERVE_GIB
    if one > available:
        raise PartEnded("skipped", f"one layer needs {one:.1f} GiB, and {available:.1f} GiB are left for it here")
    layers = most_layers(one, two, available, int(settings["NUM_LAYERS"]))
    session.part.note(
        f"One layer needs {one:.2f} GiB and each further one {two - one:.2f} GiB by the dry run; with "
        f"{available:.2f} GiB for them, {layers} of {settings['NUM_LAYERS']} layers are taken."
    )
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(_ATTEMPTS):
            metrics = Path(folder, f"{attempt}.jsonl")
            flags = ["--device", session.device, *model_flags(session, settings, layers), "--metrics-path", metrics]
            words = session.python("tools.gpu_checks.with_peak", ROOT / "pretrain_gpt.py", *flags)
            ran = session.run(words, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
            if ran.status in (0, None) or "out of memory" not in ran.output or layers == 1:
                break
            session.part.note(f"{layers} layers did not fit: out of memory.")
            layers -= 1
        must_end_well(ran)
        tokens = _MICROBATCHES * int(settings["MICRO_BATCH_SIZE"]) * int(settings["SEQ_LENGTH"])
        speed = read_speed(ran.output, metrics, tokens)
    return _tell(session, layers, speed, predicted_gib(session, settings, layers), ran)


def _tell(session: Session, layers: int, speed: Speed, predicted: float, ran: Ran) -> str:
    peak = {name: size / GIB for name, size in json.loads(ran.output.strip().splitlines()[-1])["peak"].items()}
    table = session.part.table(
        f"The model with {layers} layer(s), {_MICROBATCHES} microbatches a step", "what", "value"
    )
    table.add("tokens a second", f"{speed.tokens_per_second:,.0f}")
    table.add("seconds a step", f"{speed.step_seconds:.3f}")
    if session.device == "cpu":  # too small for any of it to be compared
        for name, size in peak.items():
            table.add(f"peak {name}, with Python and torch", f"{size:.2f} GiB")
        return f"{layers} layer(s) of small size trained at {speed.tokens_per_second:,.0f} tokens/s"
    table.add("TFLOP/s", f"{speed.tflops:.1f}")
    table.add("goal on an H200", f"{GOAL:.0f} TFLOP/s, {'reached' if speed.tflops >= GOAL else 'not reached'}")
    table.add("memory by the dry run", f"{predicted:.2f} GiB")
    for name, size in peak.items():
        table.add(f"peak {name}", f"{size:.2f} GiB, {100 * size / predicted:.0f} % of the dry run's")
    return (
        f"{layers} layer(s): {speed.tokens_per_second:,.0f} tokens/s, {speed.tflops:.1f} TFLOP/s (goal {GOAL:.0f}), "
        f"peak {peak['allocated']:.1f} GiB = {100 * peak['allocated'] / predicted:.0f} % of the dry run's"
    )
