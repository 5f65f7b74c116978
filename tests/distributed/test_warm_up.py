"""The pass before the first step leaves no trace: the same bits with and without it, and no more memory than a step."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import step_batches, tiny_arguments
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pretrain_gpt
from megatron.core.distributed.gradient_buffers import main_grad
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.training.logs.metrics import StepRecord
from megatron.training.microbatches import run_microbatches
from megatron.training.progress import Progress
from megatron.training.setup import Trainer, build_trainer
from megatron.training.training import train_step
from megatron.training.warm_up import warm_up
from tools.traffic.counter import CommunicationCounter

PP2 = {"pipeline_model_parallel_size": 2}
V2 = {"num_virtual_stages_per_pipeline_rank": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
OVERLAP = {
    "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    "ddp_bucket_size": 2000,
}  # fmt: skip
NOISY = {"moe_input_jitter_eps": 0.1, "moe_router_load_balancing_type": "global_aux_loss"}
CAPACITY = {"moe_expert_capacity_factor": 1.0}
DOCUMENTS = {"reset_position_ids": True, "reset_attention_mask": True}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
LAYOUTS: list[tuple[dict[str, Any], str]] = [
    (PP2 | EP2 | CP2 | OVERLAP | NOISY, "float32"),
    (PP2 | V2 | TP2_SP | CAPACITY | FULL, "float64"),
    (PP2 | V2 | OVERLAP | DOCUMENTS, "bfloat16"),
]


class _Memory(TorchDispatchMode):
    """Bytes of the storages that operations have made within it and that are still there, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage(), given)
        return result

    def _watch(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._known:
            return

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, gone)


def _trainer(groups: ProcessGroups, settings: dict[str, Any], dtype: str) -> Trainer:
    arguments = tiny_arguments(dtype, settings)
    cpu = torch.device("cpu")
    return build_trainer(arguments, groups, cpu, pretrain_gpt.model_provider, pretrain_gpt.forward_step)


def _two_steps(groups: ProcessGroups, settings: dict[str, Any], dtype: str, warm: bool) -> dict[str, Any]:
    """All that is left of two steps; with `warm`, after a pass before them, and what that communicated and took."""
    trainer, progress, left = _trainer(groups, settings, dtype), Progress(), {}
    torch.manual_seed(7)
    records: list[StepRecord] = []
    for step in range(2):
        source = iter(step_batches(step, groups.dp.rank, groups.dp.size, "reset_attention_mask" in settings))
        if warm and step == 0:
            weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
            with CommunicationCounter(groups) as counter, _Memory() as memory:
                source = warm_up(trainer, source, evaluates=True)
            left |= {"traffic": sorted(counter.bytes), "warm_peak": memory.peak}
            pairs = zip(weights, trainer.model.parameters(), strict=True)
            left["weights_kept"] = all(torch.equal(before, after) for before, after in pairs)
        with _Memory() as memory:
            record, _ = train_step(trainer, source, progress)
        left.setdefault("step_peak", memory.peak)
        averages = record.averages._replace(busy_seconds=[])
        records.append(replace(record, seconds=0.0, tokens_per_second=0.0, averages=averages))
    trainer.buffers.wait_for_parameters()
    return left | {
        "records": [vars(record) for record in records],
        "progress": vars(progress),
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
        "gradients": [main_grad(parameter).clone() for parameter in trainer.model.parameters()],
        "random": torch.get_rng_state(),
    }


def _compare(
    rank: int, world_size: int, layouts: list[tuple[dict[str, Any], str]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    outcomes = []
    for settings, dtype in layouts:
        parallel = tiny_arguments(dtype, settings).parallel
        groups = build_process_groups(parallel, rank, world_size)
        plain, warmed = (_two_steps(groups, settings, dtype, warm) for warm in (False, True))
        outcomes.append((plain, warmed))
    return outcomes


def _assert_same_bits(plain: dict[str, Any], warmed: dict[str, Any]) -> None:
    assert repr(warmed["records"]) == repr(plain["records"])  # as text, in which NaN equals NaN
    assert warmed["progress"] == plain["progress"]
    assert torch.equal(warmed["random"], plain["random"])
    for name in ("weights", "gradients"):
        pairs = zip(warmed[name], plain[name], strict=True)
        assert all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs), name


@pytest.mark.parametrize("layouts", [LAYOUTS[:1], pytest.param(LAYOUTS[1:], marks=pytest.mark.slow)])
def test_no_trace_is_left_in_a_pipeline(layouts: list[tuple[dict[str, Any], str]]) -> None:
    for outcomes in run_distributed(_compare, 4, layouts):
        for plain, warmed in outcomes:
            _assert_same_bits(plain, warmed)
            assert warmed["weights_kept"]
            assert warmed["warm_peak"] <= plain["step_peak"]
            # within a stage only: the group of its tensor-, context- and expert-parallel ranks
            groups = {member for _, label in warmed["traffic"] for member in label.split("=")}
            assert not groups & {"world", "control", "dp_cp", "edp"}
            assert not any(group.startswith("pp_") for group in groups)


def test_the_first_microbatch_is_not_used_up() -> None:
    trainer = _trainer(ProcessGroups(), {}, "float64")
    expected = step_batches(0, 0, 1)
    source = warm_up(trainer, iter(expected), evaluates=True)
    assert trainer.model.training
    assert [next(source) is batch for batch in expected] == [True] * len(expected)
    assert next(source, None) is None
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_gradients_that_overflow_are_forgotten() -> None:
    """The scale of float16 is found by overflows; what the pass before the first step leaves must not count as one."""
    plain, warmed = (_two_steps(ProcessGroups(), {"initial_loss_scale": 2.0**32}, "float16", w) for w in (False, True))
    assert [record["skipped"] for record in plain["records"]] == [True, True]
    _assert_same_bits(plain, warmed)


class _Operations(TorchDispatchMode):
    """What was computed: operations with the types of their tensors and the numbers that decide which kernel runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        kinds = [
            leaf.dtype if isinstance(leaf, Tensor) else leaf for leaf in leaves if isinstance(leaf, (Tensor, bool))
        ]
        self.seen.add((str(func), *map(str, kinds), (kwargs or {}).get("beta")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, NOISY | CAPACITY, FULL])
def test_steps_and_evaluations_compute_nothing_for_the_first_time(settings: dict[str, Any]) -> None:
    trainer = _trainer(ProcessGroups(), settings, "float32")
    modes = set()

    def forward_step(chunk: Any, *rest: Any) -> Any:
        modes.add((chunk.training, torch.is_grad_enabled()))
        return pretrain_gpt.forward_step(chunk, *rest)

    watched, batches = replace(trainer, forward_step=forward_step), [step_batches(step, 0, 1) for step in range(2)]
    with _Operations() as before:
        source = warm_up(watched, iter(batches[0]), evaluates=True)
    assert modes == {(True, True), (False, False)}
    with _Operations() as later:
        trainer.buffers.start_step(len(batches[0]))
        run_microbatches(trainer, source, len(batches[0]))
        trainer.model.eval()
        run_microbatches(trainer, iter(batches[1]), len(batches[1]), forward_only=True)
    assert later.seen <= before.seen


def test_what_only_evaluates_leaves_no_gradient() -> None:
    trainer, modes = _trainer(ProcessGroups(), {}, "float64"), []

    def forward_step(chunk: Any, *rest: Any) -> Any:
        modes.append((chunk.training, torch.is_grad_enabled()))
        return pretrain_gpt.forward_step(chunk, *rest)

    warm_up(replace(trainer, forward_step=forward_step), iter(step_batches(0, 0, 1)), trains=False, evaluates=True)
    assert modes == [(False, False)]
