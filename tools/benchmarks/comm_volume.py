"""Prints what the ranks of a layout send each other in a training step: measured on a small model, and by formula.

Every layout of a small Mixtral makes one step on CPU processes. All that goes through torch.distributed is counted, and
compared with the formulas of megatron/tools/traffic/volume.py, summed over the ranks. The formulas are then
applied to the two models that the toolkit is made for. A layout is written as in tp2-sp-pp2; parts: tp, pp, cp, ep,
etp, dp and vpp (chunks of layers on a pipeline rank) with a number, sp (sequence parallelism), zero (distributed
optimizer), allgather (instead of all-to-all), full and selective (recomputation).

Examples:
  python tools/benchmarks/comm_volume.py
  python tools/benchmarks/comm_volume.py --layouts tp2-sp-pp2 cp2-ep2-zero
  python tools/benchmarks/comm_volume.py --layouts --targets
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.distributed.gradient_buffers import GradientBuffers
from megatron.core.microbatch import Microbatch
from megatron.core.models.common import ModelChunks
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.optimizer.adamw import AdamW
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_scheduler import StepRates
from megatron.core.parallel_state import build_process_groups
from megatron.core.pipeline_parallel.p2p_communication import StageLink
from megatron.core.pipeline_parallel.runner import forward_backward
from megatron.core.pipeline_parallel.schedules import Pipeline
from megatron.core.recompute import RecomputeConfig
from megatron.core.tensor_parallel.parameter import initialize_parameters
from tools.run_tool import parsed, run_tool, tool_parser
from tools.traffic.counter import CommunicationCounter, group_labels, sent_share
from tools.traffic.volume import Step, Traffic, step_traffic

SMALL = ModelConfig(
    num_layers=4, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, num_experts=4,
    vocab_size=1000, make_vocab_size_divisible_by=8, moe_aux_loss_coeff=0.01,
)  # fmt: skip
LENGTH, MICRO_BATCH, MICROBATCHES = 32, 2, 4
DEFAULT = (
    "tp2", "tp2-sp", "cp2", "pp2", "pp2-vpp2", "ep2", "ep2-allgather", "dp2", "zero-dp2", "tp2-sp-full",
    "cp2-selective", "tp2-sp-pp2", "tp2-sp-ep2", "cp2-tp2-sp", "cp2-ep2-zero",
)  # fmt: skip
LARGE = ModelConfig(
    num_query_groups=8, rotary_base=1e6, vocab_size=32000, num_experts=8, moe_aux_loss_coeff=0.01,
    params_dtype="bfloat16",
)  # fmt: skip
# name, processes, model, layout, samples in a step
TARGETS = (
    ("Mixtral 4x7B", 8, replace(LARGE, num_experts=4), "tp4-sp-pp2", 128),
    ("Mixtral 8x7B", 16, LARGE, "tp4-sp-pp4", 128),
)
_FIELDS = {
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size", "etp": "expert_tensor_parallel_size",
    "vpp": "num_virtual_stages_per_pipeline_rank",
}  # fmt: skip


def parse_layout(text: str) -> tuple[int, ParallelConfig, RecomputeConfig, Literal["alltoall", "allgather"]]:
    """Processes, layout, recomputation and dispatcher that a name such as tp2-sp-pp2 stands for; raises ValueError."""
    settings: dict[str, Any] = {}
    recompute, dp = RecomputeConfig(), 1
    dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    for part in text.split("-"):
        match = re.fullmatch(r"([a-z]+)(\d*)", part)
        name, number = (match[1], match[2]) if match else (part, "")
        if name in _FIELDS and number:
            settings[_FIELDS[name]] = int(number)
        elif name == "dp" and number:
            dp = int(number)
        elif part == "sp":
            settings["sequence_parallel"] = True
        elif part == "zero":
            settings["use_distributed_optimizer"] = True
        elif part == "allgather":
            dispatcher = "allgather"
        elif part in ("full", "selective"):
            recompute = RecomputeConfig(recompute_granularity=part)  # type: ignore[arg-type]
        else:
            raise ValueError(f"layout {text}: {part!r} is none of its parts, see --help")
    parallel = ParallelConfig(**settings)
    dense = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    experts = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel
    experts *= parallel.pipeline_model_parallel_size
    return max(dense, experts) * dp, parallel, recompute, dispatcher


def small_step(text: str) -> Step:
    """The step of the small model that is measured; raises ValueError if the layout does not fit it."""
    processes, parallel, recompute, dispatcher = parse_layout(text)
    model = replace(SMALL, moe_token_dispatcher_type=dispatcher)
    parallel.check_model(model, LENGTH)
    return Step(
        model=model, parallel=parallel, recompute=recompute, world_size=processes, seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH, num_microbatches=MICROBATCHES, loss_mask_bytes=0, reported=False,
    )  # fmt: skip


def measure(step: Step, rank: int) -> dict[str, int]:
    """Bytes of this rank by 'measured|operation|group' and 'formula|operation|group'; collective."""
    cpu = torch.device("cpu")
    model_config, parallel = step.model, step.parallel
    groups = build_process_groups(parallel, rank, step.world_size)
    stages = parallel.stages(model_config.num_layers)
    model = ModelChunks(
        MixtralModel(
            model_config, groups=groups, sequence_parallel=parallel.sequence_parallel, device=cpu, stage=stage,
            recompute=step.recompute,
        )
        for stage in stages[groups.pp.rank]
    )  # fmt: skip
    for chunk in model:
        initialize_parameters(chunk, chunk.first_layer, 1)
    buffers = GradientBuffers(model, groups, parallel)
    optimizer = MixedPrecisionOptimizer(buffers, AdamW(OptimizerConfig()), OptimizerConfig(), groups)
    length = LENGTH // groups.cp.size
    shards = groups.tp.size if model.sequence_parallel else 1
    shape = (length // shards, MICRO_BATCH, model_config.hidden_size)
    link = StageLink(channels=groups.pp_channels, shape=shape, dtype=model_config.dtype, device=cpu)
    chunks = list(model)

    def forward(microbatch: int, chunk: int, hidden: Tensor | None) -> tuple[Tensor, None]:
        generator = torch.Generator().manual_seed(100 * microbatch + groups.dp_cp.rank)
        tokens = torch.randint(0, SMALL.vocab_size or 0, (2, MICRO_BATCH, length), generator=generator)
        output = chunks[chunk](tokens[0] if hidden is None else hidden, Microbatch(labels=tokens[1])).tensor
        return (output if chunks[chunk].output_layer is None else output.mean()), None

    with CommunicationCounter(groups) as counter:
        buffers.start_step(MICROBATCHES)
        pipeline = Pipeline(len(stages), len(chunks))
        forward_backward(forward, pipeline=pipeline, rank=groups.pp.rank, num_microbatches=MICROBATCHES, link=link)
        buffers.finalize()
        optimizer.step(StepRates(1e-3, 1e-3, 0.0))
    labels = group_labels(groups)
    calculated = step_traffic(step, groups.pp.rank)
    # rows of different numbers are gathered and summed by all-to-all, those of equal ones are not
    exchanged = {labels[entry.group] for entry in calculated if entry.operation == "exchange"}
    entries = [("measured", operation, group, size) for (operation, group), size in counter.bytes.items()]
    entries += [("formula", entry.operation, labels[entry.group], round(entry.bytes)) for entry in calculated]
    result: Counter[str] = Counter()
    for source, operation, group, size in entries:
        result[f"{source}|{'exchange' if group in exchanged else operation}|{group}"] += size
    return dict(result)


def _process(rank: int, processes: int, layouts: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    results = {layout: measure(small_step(layout), rank) for layout in layouts}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure_layouts(layouts: Sequence[str]) -> dict[str, dict[str, int]]:
    """What `measure` finds for each layout, summed over its ranks."""
    by_size: dict[int, list[str]] = {}
    for layout in layouts:
        by_size.setdefault(small_step(layout).world_size, []).append(layout)
    sums: dict[str, Counter[str]] = {layout: Counter() for layout in layouts}
    for processes, members in sorted(by_size.items()):
        print(f"measuring {' '.join(members)} on {processes} processes ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_process, (processes, members, folder), nprocs=processes)  # type: ignore[attr-defined,no-untyped-call]
            for path in Path(folder).glob("*.json"):
                for layout, entries in json.loads(path.read_text(encoding="utf-8")).items():
                    sums[layout].update(entries)
    return {layout: dict(sums[layout]) for layout in layouts}


def comparison(results: dict[str, dict[str, int]]) -> tuple[list[str], bool]:
    """A table of measured and calculated bytes, and whether they are equal everywhere."""
    lines = [f"{'layout':<14} {'operation':<15} {'measured bytes':>15} {'formula':>15}  group"]
    equal = True
    for layout, entries in results.items():
        for key in sorted({name.partition("|")[2] for name in entries}):
            measured, calculated = (entries.get(f"{kind}|{key}", 0) for kind in ("measured", "formula"))
            operation, group = key.split("|")
            equal &= measured == calculated
            remark = "" if measured == calculated else "  DIFFERENT"
            lines.append(f"{layout:<14} {operation:<15} {measured:>15,} {calculated:>15,}  {group}{remark}")
    return lines, equal


def target_table() -> list[str]:
    """GB that a rank of each target sends in a step, by kind of parallelism, for every pipeline stage."""
    lines = []
    for name, processes, model, layout, samples in TARGETS:
        parallel = parse_layout(layout)[1]
        dp = parallel.data_parallel_size(processes)
        lines.append(
            f"{name}, {layout} on {processes}, bf16, {samples} samples of 4096 tokens in a step, micro-batch 1: "
            "GB that a rank sends in a step"
        )
        kinds = ("TP", "PP", "experts", "DP", "control")
        lines.append("  stage" + "".join(f"{kind:>12}" for kind in (*kinds, "all")))
        step = Step(
            model=model, parallel=parallel, world_size=processes, seq_length=4096, micro_batch_size=1,
            num_microbatches=samples // dp,
        )  # fmt: skip
        for stage in range(parallel.pipeline_model_parallel_size):
            sent = [_sent(step_traffic(step, stage), kind) for kind in kinds]
            lines.append(f"  {stage:<5}" + "".join(f"{size / 1e9:>12.3f}" for size in (*sent, sum(sent))))
    lines.append("(calculated, with rings; experts: tokens gathered for the experts that tensor-parallel ranks split)")
    return lines


def _sent(entries: list[Traffic], kind: str) -> float:
    return sum(entry.bytes * sent_share(entry.operation, entry.ranks) for entry in entries if entry.kind == kind)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both tables; returns the exit status."""
    parser = tool_parser(*str(__doc__).split("\n\n", 1))
    parser.add_argument("--layouts", nargs="*", default=DEFAULT, help="layouts to measure (default: of every kind)")
    parser.add_argument("--targets", action="store_true", help="only the table of the two large models")
    args = parsed(parser, argv)
    differs: list[bool] = []

    def report() -> None:
        if not args.targets:
            lines, equal = comparison(measure_layouts(list(dict.fromkeys(args.layouts))))
            print("\n".join(lines))
            print("measured equals the formulas" if equal else "measured DIFFERS from the formulas")
            print()
            differs.append(not equal)
        print("\n".join(target_table()))

    return run_tool(report) or int(any(differs))


if __name__ == "__main__":
    sys.exit(main())
