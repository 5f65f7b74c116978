"""What a dry run says: one rank's shapes, parameters and memory, the rank that needs most, and whether it fits."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron.core.tokenizers import build_tokenizer
from megatron.training.config import Arguments
from megatron.training.dry_run import DryRun, dry_run, parse_rank, representative_ranks, state_memory
from megatron.training.dry_run_suggestions import Tools, suggestions
from megatron.training.memory_model import GIB, LibraryMemory
from megatron.training.setup import ForwardStep, ModelProvider

RANKS_OF_A_MACHINE = 8
"""At most; a dry run does not know the machines of the job."""


def print_dry_run(
    arguments: Arguments,
    remarks: Sequence[str],
    world_size: int,
    model_provider: ModelProvider,
    forward_step: ForwardStep,
) -> None:
    """Prints the rank that --dry-run asks for, the one that needs most memory, whether that fits, and what would.

    Ends with status 1 if it does not fit --gpu-memory, or nothing that was tried fits --suggest. Raises
    ValueError in a job of several processes.
    """
    if world_size > 1:
        raise ValueError("--dry-run is for one process: start it with python, without torchrun")
    for remark in remarks:
        print(f"note: {remark}")
    if arguments.model.vocab_size is None:
        if arguments.tokenizer.tokenizer_model is None and arguments.tokenizer.vocab_file is None:
            raise ValueError("--dry-run needs the size of the vocabulary: give --vocab-size or --tokenizer-model")
        tokenizer = build_tokenizer(arguments.tokenizer, None)
        arguments = replace(arguments, model=replace(arguments.model, vocab_size=tokenizer.vocab_size))

    @functools.cache
    def run(job: Arguments) -> DryRun:
        return dry_run(job, model_provider, forward_step)

    ours, ranks = parse_rank(arguments.training.dry_run or "")
    result = run(arguments)
    print(table(result, arguments), flush=True)
    needs = _needs(arguments, run, {ours: result.needed})
    print(most_needed(needs, ours), flush=True)
    fits = _judge(arguments, max(needs.values()))
    if arguments.training.suggest is not None:
        worst = _at_rank(arguments, max(needs, key=lambda rank: needs[rank]))
        tools = Tools(
            state=lambda job: state_memory(job, model_provider, forward_step),
            run=run,
            worst=lambda job: max(_needs(job, run, {}).values()),
        )
        fits = print_suggestions(worst, ranks, arguments.training.suggest * GIB, tools) and fits
    if not fits:
        sys.exit(1)


def _at_rank(arguments: Arguments, rank: int) -> Arguments:
    _, ranks = parse_rank(arguments.training.dry_run or "")
    return replace(arguments, training=replace(arguments.training, dry_run=f"{rank}/{ranks}"))


def _needs(arguments: Arguments, run: Callable[[Arguments], DryRun], known: dict[int, int]) -> dict[int, int]:
    """Bytes by rank, of those that may need most; `known` need not be run."""
    ranks = representative_ranks(arguments)
    return {rank: known[rank] if rank in known else run(_at_rank(arguments, rank)).needed for rank in ranks}


def _judge(arguments: Arguments, need: int) -> bool:
    """Prints whether `need` bytes fit; False if they do not fit what was asked for."""
    if arguments.training.gpu_memory is not None:
        size = arguments.training.gpu_memory * GIB
    elif torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    else:
        if arguments.training.suggest is None:
            print("--gpu-memory GIB says whether that fits a GPU, --suggest GIB with which flags it would")
        return True
    print(verdict(need, size))
    return arguments.training.gpu_memory is None or need <= size


def print_suggestions(arguments: Arguments, world_size: int, size: float, tools: Tools) -> bool:
    """Prints what was tried as it is found, a line each; whether anything fits `size` bytes."""
    print(f"changes of flags to fit {size / GIB:.1f} GiB, cheapest first; each needs less than those above it")
    found = None
    for found in suggestions(arguments, world_size, size, tools):
        cost = f": {found.cost}" if found.cost else ""
        bound = "over" if found.at_least else "    "
        print(f"{bound} {found.needed / GIB:7.1f} GiB  {found.flags or 'as given'}{cost}", flush=True)
    assert found is not None
    if found.needed > size:
        print(f"nothing that was tried fits {size / GIB:.1f} GiB: take more ranks, a smaller --seq-length, or both")
        return False
    print(f"fits {size / GIB:.1f} GiB: {f'add {found.flags}' if found.flags else 'no change is needed'}")
    return True


def most_needed(needs: dict[int, int], ours: int) -> str:
    """The line on the rank that needs most, of those of `needs` (bytes by rank)."""
    worst = max(needs, key=lambda rank: needs[rank])
    if needs[worst] == needs[ours]:
        return f"in all {needs[ours] / GIB:.1f} GiB; no rank needs more"
    return f"in all {needs[ours] / GIB:.1f} GiB; rank {worst} needs most: {needs[worst] / GIB:.1f} GiB"


def verdict(need: int, size: float) -> str:
    """Whether `need` bytes fit a GPU of `size` bytes, and what to do if not."""
    have = f"a GPU of {size / GIB:.1f} GiB"
    if need <= size:
        return f"fits {have}: {(size - need) / GIB:.1f} GiB are left"
    return (
        f"does not fit {have}: {(need - size) / GIB:.1f} GiB too much. More tensor- or pipeline-parallel ranks, "
        "--use-distributed-optimizer with several data-parallel ranks, --recompute-granularity, or a smaller "
        "--micro-batch-size make it less"
    )


def table(result: DryRun, arguments: Arguments) -> str:
    """The report as text."""
    groups, model = result.groups, arguments.model
    places = [("pipeline", groups.pp), ("data", groups.dp), ("context", groups.cp), ("tensor", groups.tp)]
    if groups.ep.size > 1:
        places += [("expert", groups.ep), ("expert tensor", groups.etp)]
    lines = [
        f"dry run of rank {groups.world.rank} of {groups.world.size}: "
        + ", ".join(f"{name} {group.rank} of {group.size}" for name, group in places),
        f"{result.model} {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts of "
        f"{model.ffn_hidden_size}, vocabulary {model.vocab_size}, {model.params_dtype}: {result.model_parameters:,} "
        "parameters in the whole model",
        f"{'stage':22} {'parameters':>15}  {'input':>17}  {'output':>17}  {'kept of a microbatch':>20}",
    ]
    for chunk in result.chunks:
        layers = chunk.stage.layers
        name = f"layers {layers.start}-{layers.stop - 1}" if len(layers) > 1 else f"layer {layers.start}"
        name = (
            ("embedding, " if chunk.stage.has_embedding else "") + name + (", loss" if chunk.stage.has_output else "")
        )
        ends = [str(list(shape)) if shape else "loss" for shape in (chunk.input_shape, chunk.output_shape)]
        lines.append(
            f"{name:22} {chunk.parameters:15,}  {ends[0]:>17}  {ends[1]:>17}  {_gib(chunk.activation_bytes):>20}"
        )
    optimizer = result.chosen_optimizer
    rows = [
        ("weights", result.weights),
        ("gradients", result.gradients),
        ("optimizer", optimizer),
        ("activations", result.activations),
        ("total", result.weights + result.gradients + optimizer + result.activations),
    ]
    lines.append("memory of the rank")
    lines += [f"{name:22} {_gib(size):>15}" for name, size in rows]
    if result.host:
        ranks = min(groups.world.size, RANKS_OF_A_MACHINE)
        lines.append(
            f"and in the host's memory {_gib(result.host)} of the optimizer, {_gib(ranks * result.host)} on a machine "
            f"with {ranks} such ranks"
        )
    if result.sharded_optimizer < result.optimizer == optimizer:
        lines.append(
            f"with --use-distributed-optimizer the optimizer's state would lie on {result.groups.dp_cp.size} ranks: "
            f"{_gib(result.sharded_optimizer)} on each"
        )
    lines.append(
        f"activations are those of {result.live} live microbatches ({result.microbatches} in a step), with temporary "
        "tensors and messages"
    )
    lines.append("peak by phase")
    worst = max(result.peaks, key=lambda phase: result.peaks[phase])
    for phase, size in result.peaks.items():
        lines.append(f"{phase:22} {_gib(size):>15}" + ("  the most, which is judged" if phase == worst else ""))
    lines.append(libraries_line(result.libraries))
    return "\n".join(lines)


def libraries_line(libraries: LibraryMemory) -> str:
    """What to leave free besides the tensors, as text."""
    parts = (("NCCL", libraries.nccl), ("CUDA", libraries.cuda), ("fragmentation", libraries.fragmentation))
    return f"plus about {libraries.total / 2**30:.1f} GiB for NCCL, CUDA and fragmentation, by a rule: " + ", ".join(
        f"{name} {size / 2**30:.1f}" for name, size in parts
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
