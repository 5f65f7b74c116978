"""Every byte that a training step sends is in the formulas: measured equals calculated, by collective and group."""

from collections import Counter
from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import step_batches, tiny_arguments

import pretrain_gpt
from megatron.core.parallel_state import build_process_groups
from megatron.training.progress import Progress
from megatron.training.setup import build_trainer
from megatron.training.training import train_step
from tools.traffic.counter import CommunicationCounter, group_labels
from tools.traffic.volume import Step, step_traffic

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
ZERO = {"use_distributed_optimizer": True}
BUCKETS = {"overlap_grad_reduce": True, "ddp_bucket_size": 2000}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe")}

Measured = tuple[dict[tuple[str, str], int], dict[tuple[str, str], float]]


def measure(rank: int, world_size: int, layouts: list[dict[str, Any]]) -> list[Measured]:
    """Measured and calculated bytes of a step of each layout, by operation and group."""
    return [_measure(rank, world_size, settings) for settings in layouts]


def _measure(rank: int, world_size: int, settings: dict[str, Any]) -> Measured:
    arguments = tiny_arguments("float32", settings)
    groups = build_process_groups(arguments.parallel, rank, world_size)
    trainer = build_trainer(
        arguments, groups, torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step
    )
    microbatches = step_batches(0, groups.dp.rank, groups.dp.size)
    with CommunicationCounter(groups) as counter:
        train_step(trainer, iter(microbatches), Progress())
        trainer.buffers.wait_for_parameters()  # of which most are gathered by the next forward pass
    step = Step(
        model=arguments.model,
        parallel=arguments.parallel,
        recompute=arguments.recompute,
        world_size=world_size,
        seq_length=arguments.data.seq_length,
        micro_batch_size=arguments.training.micro_batch_size,
        num_microbatches=len(microbatches),
        loss_mask_bytes=microbatches[0]["loss_mask"].element_size(),
    )
    labels = group_labels(groups)
    calculated: Counter[tuple[str, str]] = Counter()
    for entry in step_traffic(step, groups.pp.rank):
        calculated[entry.operation, labels[entry.group]] += entry.bytes
    return dict(counter.bytes), dict(calculated)


def total(parts: list[dict[tuple[str, str], Any]]) -> dict[tuple[str, str], Any]:
    whole: Counter[tuple[str, str]] = Counter()
    for part in parts:
        whole.update(part)
    return dict(whole)


TWO = {
    "tp2": TP2,
    "tp2_sp": TP2 | SP,
    "tp2_sp_recompute_full": TP2 | SP | FULL,
    "pp2": PP2,
    "pp2_virtual": PP2 | {"num_virtual_stages_per_pipeline_rank": 2},
    "dp2": {},
    "dp2_buckets": BUCKETS,
    "cp2": CP2,
    "cp2_recompute": CP2 | SELECTIVE,
}
# ranks receive different numbers of rows, or own different parameters: the sum over all ranks is known
SHARED_OUT = {
    "zero": ZERO,
    "zero_buckets": ZERO | BUCKETS | {"overlap_param_gather": True},
    "ep2": EP2,
    "ep2_allgather": EP2 | ALLGATHER,
    "ep2_recompute": EP2 | SELECTIVE,
    "tp2_sp_ep2_etp1": TP2 | SP | EP2 | ETP1,
}


FOUR = {
    "tp2_sp_pp2": TP2 | SP | PP2,
    "tp2_pp2_virtual_recompute": TP2 | PP2 | FULL | {"num_virtual_stages_per_pipeline_rank": 2},
    "cp2_tp2_sp": CP2 | TP2 | SP | {"moe_router_load_balancing_type": "seq_aux_loss"},
    "cp2_tp2_recompute": CP2 | TP2 | SELECTIVE,
    "cp2_pp2": CP2 | PP2,
    "tp2_dp2": TP2,
}
FOUR_SHARED_OUT = {
    "tp2_sp_dp2_zero": TP2 | SP | ZERO | BUCKETS,
    "pp2_ep2": PP2 | EP2,
    "cp2_ep2_zero": CP2 | EP2 | ZERO,
    "tp2_sp_ep2": TP2 | SP | EP2,
    "tp2_sp_ep2_recompute": TP2 | SP | EP2 | FULL,
    "ep2_etp2_allgather": EP2 | {"expert_tensor_parallel_size": 2} | ALLGATHER,
    "cp2_tp2_sp_ep2_capacity": CP2 | TP2 | SP | EP2 | ALLGATHER
    | {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "probs"},
}  # fmt: skip


def compare(world_size: int, exact: dict[str, dict[str, Any]], shared_out: dict[str, dict[str, Any]]) -> None:
    outcomes = run_distributed(measure, world_size, [*exact.values(), *shared_out.values()])
    for number, name in enumerate([*exact, *shared_out]):
        ranks = [outcome[number] for outcome in outcomes]
        if name in exact:
            for measured, calculated in ranks:
                assert measured == calculated, name
        measured, calculated = total([part for part, _ in ranks]), total([part for _, part in ranks])
        exchanged = {label for operation, label in calculated if operation == "exchange"}
        if exchanged:  # rows of different numbers are gathered and summed by all-to-all, those of equal ones are not
            measured, calculated = without_operations(measured, exchanged), without_operations(calculated, exchanged)
        assert measured == calculated, name


def without_operations(bytes: dict[tuple[str, str], Any], groups: set[str]) -> dict[tuple[str, str], Any]:
    """With all operations of some groups in one entry."""
    return total([{("" if key[1] in groups else key[0], key[1]): size} for key, size in bytes.items()])


def test_measured_equals_calculated_on_two_ranks() -> None:
    compare(2, TWO, SHARED_OUT)


@pytest.mark.slow
def test_measured_equals_calculated_on_four_ranks() -> None:
    compare(4, FOUR, FOUR_SHARED_OUT)
