"""Parts: the same few steps of a small model on a GPU and on the CPU, and under all layouts that the machine allows."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tools.gpu_checks.commands import Ran
from tools.gpu_checks.session import Device, PartEnded, Session, must_end_well

STEPS = 3
# What the first weights and the data are does not depend on device or layout.
_COMMON = (
    f"--tokenizer-type NullTokenizer --mock-data --train-iters {STEPS} --lr 1e-4 --moe-router-topk 2 "
    "--moe-aux-loss-coeff 1e-2 --micro-batch-size 1 --global-batch-size 4 --eval-iters 0 --eval-interval 0 "
    "--log-interval 1"
)
_SIZES = {
    "cuda": "--num-layers 4 --hidden-size 512 --ffn-hidden-size 1792 --num-attention-heads 8 --num-query-groups 4 "
    "--num-experts 8 --vocab-size 4096 --seq-length 512",
    "cpu": "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --num-query-groups 2 "
    "--num-experts 4 --vocab-size 512 --seq-length 64",
}
# float32 is float32 everywhere: the variable keeps libraries from rounding operands to TF32.
_EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

# Seconds, and times those of one process, after which a layout is taken to hang; the others still have their turn.
_PATIENCE, _PATIENCE_TIMES = 30.0, 6.0


class Step(NamedTuple):
    """What a step's line of --metrics-path says."""

    loss: float
    grad_norm: float


# The largest |a - b| / |b| of a step's loss and gradient norm. In float32 two kinds of products on one CPU differ by
# 6e-8, and a run in bfloat16 by 6e-5 and 2e-3: operands that are rounded must be seen. In bfloat16 a router chooses
# another expert for some tokens.
BOUNDS = {"float32": Step(5e-6, 1e-4), "bfloat16": Step(1e-3, 2e-2)}
_DTYPE_FLAGS: dict[str, tuple[str, ...]] = {"float32": (), "bfloat16": ("--bf16",)}


@dataclass(frozen=True)
class Layout:
    """Ranks and the flags that share the model out to them."""

    name: str
    ranks: int
    flags: tuple[object, ...] = ()
    on_gpus_only: bool = False
    """Left out where the check itself is tried on a CPU, to keep that short."""


_TP, _PP, _EP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"
LAYOUTS = (
    Layout("1 rank", 1),
    Layout("1 rank, optimizer's state on the host", 1, ("--optimizer-cpu-offload",), True),
    Layout("DP=2, ZeRO-1", 2, ("--use-distributed-optimizer",), True),
    Layout("TP=2, sequence parallel", 2, (_TP, 2, "--sequence-parallel")),
    Layout("PP=2", 2, (_PP, 2)),
    Layout("EP=2", 2, (_EP, 2)),
    Layout("CP=2", 2, ("--context-parallel-size", 2), True),
    Layout("TP=2, PP=2", 4, (_TP, 2, _PP, 2, "--sequence-parallel")),
    Layout("TP=2, EP=2, DP=2", 4, (_TP, 2, _EP, 2, "--expert-tensor-parallel-size", 1, "--sequence-parallel")),
    Layout("TP=2, PP=2, EP=2, DP=2", 8, (_TP, 2, _PP, 2, _EP, 2, "--sequence-parallel")),
)


def training_words(session: Session, device: Device, metrics: Path, ranks: int, *flags: object) -> list[str]:
    """The command of a small run, under torchrun if there are ranks."""
    words = [*_SIZES[session.device].split(), *_COMMON.split(), *flags, "--metrics-path", metrics]
    return session.python("pretrain_gpt.py", "--device", device, *words, ranks=ranks)


def read_steps(ran: Ran, metrics: Path) -> list[Step]:
    """The steps that a run recorded. Raises PartEnded if it failed or took fewer."""
    must_end_well(ran)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [Step(line["lm_loss"], line["grad_norm"]) for line in lines if "lm_loss" in line]
    if len(steps) != STEPS:
        raise PartEnded("failed", f"{ran.name} recorded {len(steps)} steps of {STEPS}")
    return steps


def differences(ours: list[Step], reference: list[Step]) -> tuple[list[float], list[float]]:
    """|a - b| / |b| of losses and of gradient norms, step by step; NaN where a number is not finite."""
    losses = [abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(ours, reference, strict=True)]
    norms = [abs(a.grad_norm - b.grad_norm) / abs(b.grad_norm) for a, b in zip(ours, reference, strict=True)]
    return losses, norms


def within(bounds: Step, losses: list[float], norms: list[float]) -> bool:
    """Whether all differences are small enough; NaN is not."""
    return all(d <= bounds.loss for d in losses) and all(d <= bounds.grad_norm for d in norms)


def check_numerics(session: Session) -> str:
    """Compares a GPU with the CPU. Raises PartEnded if a loss or a gradient norm differs too much."""
    # a trial on a CPU compares its own two kinds of products
    other = () if session.device == "cuda" else ("--moe-grouped-gemm-backend", "grouped_mm")
    runs: list[tuple[Device, tuple[str, ...]]] = [
        (device, (*_DTYPE_FLAGS[dtype], *flags))
        for dtype in BOUNDS
        for device, flags in (("cpu", ()), (session.device, other))
    ]
    who, usual = ("GPU", "CPU") if session.device == "cuda" else ("grouped_mm", "usual products")
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.jsonl") for number in range(len(runs))]
        commands = [
            training_words(session, device, file, 0, *flags) for (device, flags), file in zip(runs, files, strict=True)
        ]
        done = session.run_together(commands, _EXACT)
        for number, (dtype, bounds) in enumerate(BOUNDS.items()):
            reference, ours = (read_steps(done[n], files[n]) for n in (2 * number, 2 * number + 1))
            table = session.part.table(
                f"{dtype}, {who} against {usual}; differences are |a - b| / |b|, at most {bounds.loss:.0e} for the "
                f"loss and {bounds.grad_norm:.0e} for the gradient norm",
                "step", "loss", f"loss, {usual}", "difference", "gradient norm", usual, "its difference",
            )  # fmt: skip
            losses, norms = differences(ours, reference)
            for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
                table.add(
                    step + 1, f"{a.loss:.7f}", f"{b.loss:.7f}", f"{losses[step]:.1e}", f"{a.grad_norm:.6f}",
                    f"{b.grad_norm:.6f}", f"{norms[step]:.1e}",
                )  # fmt: skip
            if not within(bounds, losses, norms):
                bad.append(dtype)
    session.part.note("TF32 is off (torch's default, and NVIDIA_TF32_OVERRIDE=0).")
    if bad:
        raise PartEnded("failed", f"{who} and {usual} differ by more than the bounds in {', '.join(bad)}")
    return f"{who} and {usual} agree in {' and '.join(BOUNDS)}"


def check_layouts(session: Session) -> str:
    """Tries the collectives, then compares each layout with one process. Raises PartEnded if one differs or fails."""
    most = session.machine.ranks(session.device)
    for ranks in sorted({1, most}):
        ran = session.run(
            session.python("tools.gpu_checks.collectives", session.device, ranks=ranks),
            at_most=session.seconds_left / 2,
        )
        rows = [line.split("\t")[1:] for line in ran.output.splitlines() if line.startswith("collective\t")]
        heads = ("operation", "MiB a rank", "milliseconds", "GB/s")
        if rows:
            table = session.part.table(f"Collectives, {ranks} rank(s)", *heads)
            for row in rows:
                table.add(*row)
        must_end_well(ran)
    wanted = [layout for layout in LAYOUTS if session.device == "cuda" or not layout.on_gpus_only]
    fitting = [layout for layout in wanted if layout.ranks <= most]
    left_out = [layout.name for layout in wanted if layout.ranks > most]
    if left_out:
        session.part.note(f"Left out, since they need more ranks than {most}: {'; '.join(left_out)}.")
    bad = _compare_layouts(session, fitting)
    if bad:
        raise PartEnded("failed", f"not equal to one process: {'; '.join(bad)}")
    return f"collectives and {len(fitting)} layout(s) on {most} rank(s) give one process's numbers"


def _compare_layouts(session: Session, layouts: list[Layout]) -> list[str]:
    """Names of those that fail, hang or differ. Raises PartEnded when the time for all is over."""
    bounds, bad = BOUNDS["float32"], []
    table = session.part.table(
        f"Layouts in float32, three steps against one process; |a - b| / |b| is at most {bounds.loss:.0e} and "
        f"{bounds.grad_norm:.0e}",
        "layout", "ranks", "largest difference of the loss", "of the gradient norm", "result", "seconds",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(folder, "alone.jsonl")
        ran_alone = session.run(training_words(session, session.device, alone, 0), _EXACT)
        reference, patience = read_steps(ran_alone, alone), max(_PATIENCE, _PATIENCE_TIMES * ran_alone.seconds)
        for number, layout in enumerate(layouts):
            file = Path(folder, f"{number}.jsonl")
            words = training_words(session, session.device, file, layout.ranks, *layout.flags)
            ran = session.run(words, _EXACT, patience)
            result, cells = "equal", ("", "")
            try:
                losses, norms = differences(read_steps(ran, file), reference)
                cells = (f"{max(losses):.1e}", f"{max(norms):.1e}")
                result = "equal" if within(bounds, losses, norms) else "differs"
            except PartEnded:
                if ran.status is None and session.seconds_left < 1:
                    raise PartEnded("unfinished", f"{layout.name} was {ran.ending}") from None
                result = f"{ran.ending}: {ran.last_words[:150]}"
            table.add(layout.name, layout.ranks, *cells, result, f"{ran.seconds:.0f}")
            bad += [] if result == "equal" else [layout.name]
    return bad
