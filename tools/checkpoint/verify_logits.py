"""Logits of transformers' model and of ours at the layout of a checkpoint, layer by layer."""

import json
import math
import tempfile
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.config import ModelConfig, ParallelConfig
from megatron.core.interchange import CHECKPOINT_FILE, Layout
from megatron.core.interchange.element_types import to_torch
from megatron.core.interchange.stored_tensor import open_torch, stored_tensor
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.stages import Stage
from megatron.core.tensor_parallel.parameter import named_shards
from tools.checkpoint.loader_mixtral import PerRankSource
from tools.checkpoint.megatron_names import plain_names


@dataclass(frozen=True)
class Comparison:
    """What came out."""

    equal: bool = True
    text: str = ""


@dataclass(frozen=True)
class _Task:
    """What a rank needs to know."""

    folder: Path
    layout: Layout
    stages: dict[tuple[int, int], Stage]
    model: ModelConfig
    work: Path
    tokens: Tensor
    """[B, S]"""


def compared_length(length: int, window: int | None, tensor: int) -> int:
    """`length`, made a multiple of the tensor-parallel size, within the tokens that a position attends to.

    Our model attends to all tokens, as training does, so that beyond the window the two are not meant to be equal.
    Raises ValueError if no length is possible.
    """
    whole = max(math.ceil(length / tensor), 1) * tensor
    if window is None or whole <= window:
        return whole
    if window < tensor:
        raise ValueError(
            f"config.json: a sliding_window of {window} is shorter than the {tensor} tensor-parallel ranks' shortest "
            "sequence: convert the checkpoint to a smaller --target-tensor-parallel-size to compare logits"
        )
    return window // tensor * tensor


def compare_logits(huggingface: Path, source: PerRankSource, length: int, tolerance: float) -> Comparison:
    """Runs both models on the same two sequences of `length` tokens (see `compared_length`); in float32 on the CPU.

    Raises ValueError with the reason if a rank fails, or if transformers does not find all weights.
    """
    model, layout = replace(source.description.model, params_dtype="float32"), source.layout
    assert model.vocab_size is not None
    tokens = torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as work:
        torch.save(_reference(huggingface, tokens), Path(work) / "reference.pt")
        task = _Task(source.folder, layout, source.stages, model, Path(work), tokens)
        world_size = layout.pipeline * layout.writers_per_stage
        context = get_context("spawn")
        processes = [
            context.Process(target=_rank, args=(rank, world_size, task), daemon=True) for rank in range(world_size)
        ]
        if world_size == 1:
            _rank(0, 1, task)
            processes = []
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        found: dict[int, tuple[float, float]] = {}
        for rank in range(world_size):
            result = Path(work) / f"{rank}.json"
            content: dict[str, Any] = {"error": "the process died"}
            if result.exists():
                content = json.loads(result.read_text())
            if "error" in content:
                raise ValueError(f"rank {rank} failed: {content['error']}")
            for layer, pair in content.items():
                before = found.get(int(layer), (0.0, 0.0))
                found[int(layer)] = (max(before[0], pair[0]), max(before[1], pair[1]))
    return _judged(found, model.num_layers, layout, tolerance)


def _judged(found: dict[int, tuple[float, float]], layers: int, layout: Layout, tolerance: float) -> Comparison:
    assert sorted(found) == list(range(layers + 1)), "a layer was not compared"
    for layer in range(layers + 1):
        relative, largest = found[layer]
        if not relative <= tolerance:
            what = f"layer {layer} is the first to diverge: its output differs" if layer < layers else "logits differ"
            return Comparison(
                False, f"logits: {what} by {relative:.1e} (||ours - theirs|| / ||theirs||), {largest:.1e} at most"
            )
    relative, largest = found[layers]
    return Comparison(True, f"logits at {layout}: the largest difference is {largest:.1e}, relative {relative:.1e}")


@torch.no_grad()
def _reference(folder: Path, tokens: Tensor) -> list[Tensor]:
    """Output of every layer [B, S, H], and the logits [B, S, V], of transformers' model."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(f"{folder}: transformers reports {kind.replace('_', ' ')}: {sorted(report[kind])[0]}")
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    for layer in model.model.layers:
        layer.register_forward_hook(keep)
    logits = model.eval()(tokens, use_cache=False).logits
    return [*outputs, logits]


def _rank(rank: int, world_size: int, task: _Task) -> None:
    """One rank: the process's result is a file that maps a layer to its relative and largest difference."""
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{task.work / 'store'}", rank=rank, world_size=world_size,
                timeout=timedelta(minutes=30),
            )  # fmt: skip
        result: dict[str, object] = {str(layer): pair for layer, pair in _forward(rank, world_size, task).items()}
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    (task.work / f"{rank}.json").write_text(json.dumps(result))


def _forward(rank: int, world_size: int, task: _Task) -> dict[int, tuple[float, float]]:
    layout = task.layout
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.tensor > 1,
    )
    groups = build_process_groups(parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    reference = torch.load(task.work / "reference.pt", weights_only=True, mmap=True)
    found: dict[int, tuple[float, float]] = {}
    hidden: Tensor | None = None
    order = sorted(task.stages, key=lambda place: (place[1], place[0]))
    chunks = {place: chunk for place in order if place[0] == groups.pp.rank for chunk in [_stage(task, groups, place)]}
    for number, place in enumerate(order):
        if place in chunks:
            hidden = _run_stage(chunks[place], groups, task.tokens, hidden, reference, found)
        if number + 1 < len(order) and order[number + 1][0] != place[0]:
            hidden = _hand_on(hidden, groups, place[0], order[number + 1][0], task)
    return found


def _hand_on(hidden: Tensor | None, groups: ProcessGroups, sender: int, receiver: int, task: _Task) -> Tensor | None:
    """Sends hidden states from one pipeline rank to another."""
    if groups.pp.rank == sender:
        assert hidden is not None
        dist.send(hidden.contiguous(), groups.pp.ranks[receiver])
    elif groups.pp.rank == receiver:
        batch, length = task.tokens.shape
        hidden = torch.empty(length // groups.tp.size, batch, task.model.hidden_size)
        dist.recv(hidden, groups.pp.ranks[sender])
        return hidden
    return None


def _stage(task: _Task, groups: ProcessGroups, place: tuple[int, int]) -> MixtralModel:
    """A stage with the weights of this rank's own file."""
    stage = MixtralModel(
        task.model,
        groups=groups,
        sequence_parallel=groups.tp.size > 1,
        device=torch.device("cpu"),
        stage=task.stages[place],
    )
    path = task.folder / task.layout.folder(groups.tp.rank, groups.pp.rank, groups.ep.rank) / CHECKPOINT_FILE
    content, records = open_torch(path)
    key = "model" if "model" in content else f"model{place[1]}"
    tensors = {
        name: stored_tensor(path, records, name, value)
        for name, value in content[key].items()
        if not name.endswith("_extra_state")
    }
    stored = plain_names(path, tensors, task.model.num_experts // task.layout.expert)
    for shard in named_shards(stage, stage.first_layer):
        held = stored[shard.stage_name][1]
        tensor = to_torch(held.read(), held.dtype)
        if tensor.shape != shard.data.shape:  # another --make-vocab-size-divisible-by
            raise ValueError(f"{path}: {shard.stage_name} has shape {list(tensor.shape)}, not {list(shard.data.shape)}")
        shard.data.copy_(tensor)
    return stage


@torch.no_grad()
def _run_stage(
    stage: MixtralModel,
    groups: ProcessGroups,
    tokens: Tensor,
    hidden: Tensor | None,
    reference: list[Tensor],
    found: dict[int, tuple[float, float]],
) -> Tensor:
    def compare(layer: int, ours: Tensor, theirs: Tensor) -> None:
        apart = ours.double() - theirs.double()
        found[layer] = (float(apart.norm() / theirs.double().norm()), float(apart.abs().max()))

    handles = []
    for layer, module in enumerate(stage.decoder.layers, stage.first_layer):

        def hook(_: nn.Module, __: object, output: tuple[Tensor, object], layer: int = layer) -> None:
            part = reference[layer].transpose(0, 1).chunk(groups.tp.size)[groups.tp.rank]
            compare(layer, output[0], part)

        handles.append(module.register_forward_hook(hook))
    output = stage(tokens if hidden is None else hidden).tensor
    for handle in handles:
        handle.remove()
    if stage.output_layer is not None:
        compare(len(reference) - 1, output, reference[-1])
    return output
