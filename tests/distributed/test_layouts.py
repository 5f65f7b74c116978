"""Every layout trains the same model: loss, auxiliary losses, every gradient, and weights after five steps."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import join_shards, relative_difference, train_tiny

STEPS = 5


@dataclass(frozen=True)
class Layout:
    """One way to spread the tiny model."""

    world_size: int
    settings: dict[str, Any]
    """Fields of any configuration (see `tiny_arguments`) in which the layout differs from one process."""
    shared_settings: dict[str, Any] = field(default_factory=dict)
    """Fields that the one process it is compared with has as well."""
    quick: bool = False
    """Whether it is part of the default run; `make verify` runs all."""
    float32: bool = False
    """Whether it is compared in float32 too."""


TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
V2 = {"num_virtual_stages_per_pipeline_rank": 2}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
CP4 = {"context_parallel_size": 4}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "moe_act", "layernorm")}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}
MOE = {"recompute_granularity": "selective", "recompute_modules": ("moe", "core_attn")}
DOCUMENTS = {"reset_attention_mask": True, "reset_position_ids": True}
ZERO = {"use_distributed_optimizer": True}
# buckets so small that most tensors have their own, and some neighbours share one
OVERLAP_GRADS = {"overlap_grad_reduce": True, "ddp_bucket_size": 2000}
ZERO_OVERLAP = ZERO | OVERLAP_GRADS | {"overlap_param_gather": True}
OFFLOAD = {"optimizer_cpu_offload": True}
HALF = OFFLOAD | {"optimizer_offload_fraction": 0.5}
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP1 = {"expert_tensor_parallel_size": 1}
ETP2 = {"expert_tensor_parallel_size": 2}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
PADDED = {"moe_pad_expert_input_to_capacity": True}
BY_SEQUENCE = {"moe_router_load_balancing_type": "seq_aux_loss"}
BY_STEP = {"moe_router_load_balancing_type": "global_aux_loss"}
JITTER = {"moe_input_jitter_eps": 0.1}
DROP_BY_PROBS = {"moe_expert_capacity_factor": 0.7}
DROP_BY_POSITION = {"moe_expert_capacity_factor": 0.7, "moe_token_drop_policy": "position"}

LAYOUTS = {
    "tp2": Layout(2, TP2, quick=True, float32=True),
    "tp2_sp": Layout(2, TP2 | SP, quick=True, float32=True),
    "pp2": Layout(2, PP2, quick=True, float32=True),
    "pp4": Layout(4, PP4),
    "dp2": Layout(2, {}, quick=True, float32=True),
    "tp2_pp2": Layout(4, TP2 | PP2, float32=True),
    "tp2_sp_pp2": Layout(4, TP2 | SP | PP2, quick=True, float32=True),
    "tp2_dp2": Layout(4, TP2),
    "pp2_dp2": Layout(4, PP2),
    "pp2_uneven": Layout(2, PP2 | {"decoder_first_pipeline_num_layers": 1}, quick=True),
    "pp2_v2": Layout(2, PP2 | V2, quick=True, float32=True),
    "pp2_v4": Layout(2, PP2 | {"num_layers_per_virtual_pipeline_stage": 1}, shared_settings={"num_layers": 8}),
    "pp2_v2_no_overlap": Layout(2, PP2 | V2 | {"no_overlap_p2p_communication": True}),
    "pp2_v2_uneven": Layout(2, PP2 | V2 | {"decoder_first_pipeline_num_layers": 2}, shared_settings={"num_layers": 6}),
    "pp4_v2": Layout(4, PP4 | V2, shared_settings={"num_layers": 8}),
    "tp2_pp2_v2": Layout(4, TP2 | PP2 | V2),
    "pp2_v2_dp2": Layout(4, PP2 | V2),
    "tp2_sp_pp2_v2_dp2": Layout(8, TP2 | SP | PP2 | V2),
    "pp4_uneven": Layout(4, PP4 | {"decoder_last_pipeline_num_layers": 2}, shared_settings={"num_layers": 5}),
    "ep2": Layout(2, EP2, quick=True, float32=True),
    "ep2_allgather": Layout(2, EP2 | ALLGATHER, quick=True),
    "ep4": Layout(4, EP4),
    "ep2_dp2": Layout(4, EP2 | ALLGATHER),
    "tp2_sp_etp1": Layout(2, TP2 | SP | ETP1),
    "tp2_sp_ep2_etp1": Layout(2, TP2 | SP | EP2 | ETP1, quick=True, float32=True),
    "tp2_sp_ep2_etp1_allgather": Layout(2, TP2 | SP | EP2 | ETP1 | ALLGATHER),
    "tp2_sp_ep2": Layout(4, TP2 | SP | EP2, quick=True),
    "tp2_sp_ep2_allgather": Layout(4, TP2 | SP | EP2 | ALLGATHER),
    "etp2": Layout(2, ETP2),
    "ep2_etp2": Layout(4, EP2 | ETP2),
    "tp4_sp_ep4_etp1": Layout(4, TP4 | SP | EP4 | ETP1, shared_settings={"num_query_groups": 4}),
    "pp2_ep2": Layout(4, PP2 | EP2),
    "tp2_sp_pp2_ep4_etp1": Layout(8, TP2 | SP | PP2 | EP4 | ETP1),
    "tp2_sp_ep2_dp4": Layout(8, TP2 | SP | EP2),
    "ep2_zero_overlap": Layout(4, EP2 | ZERO_OVERLAP),
    "cp2_tp2_sp_ep4_etp1": Layout(4, CP2 | TP2 | SP | EP4 | ETP1),
    "tp2_sp_ep2_etp1_seq_aux_loss": Layout(2, TP2 | SP | EP2 | ETP1, shared_settings=BY_SEQUENCE, quick=True),
    "cp2_ep2_seq_aux_loss": Layout(4, CP2 | EP2, shared_settings=BY_SEQUENCE),
    "tp2_sp_ep2_etp1_capacity": Layout(2, TP2 | SP | EP2 | ETP1, shared_settings=DROP_BY_PROBS, quick=True),
    "tp2_sp_ep2_dp2_global_aux_loss_jitter": Layout(4, TP2 | SP | EP2, shared_settings=BY_STEP | JITTER, quick=True),
    "pp2_cp2_jitter_recompute": Layout(4, CP2 | PP2 | MOE, shared_settings=JITTER),
    "pp2_dp2_global_aux_loss": Layout(4, PP2, shared_settings=BY_STEP),
    "tp2_capacity": Layout(2, TP2, shared_settings=DROP_BY_PROBS),
    "cp2_tp2_sp_capacity": Layout(4, CP2 | TP2 | SP | PADDED, shared_settings=DROP_BY_POSITION),
    "ep2_allgather_capacity": Layout(2, EP2 | ALLGATHER | PADDED, shared_settings=DROP_BY_PROBS),
    "tp2_sp_ep2_capacity": Layout(4, TP2 | SP | EP2 | PADDED, shared_settings=DROP_BY_POSITION),
    "tp4_sp_pp2": Layout(8, TP4 | SP | PP2, shared_settings={"num_query_groups": 4}),
    "tp2_sp_pp2_dp2": Layout(8, TP2 | SP | PP2),
    "cp2": Layout(2, CP2, quick=True, float32=True),
    "cp4": Layout(4, CP4),
    "cp2_dp2": Layout(4, CP2),
    "cp2_pp2": Layout(4, CP2 | PP2),
    "cp2_tp2": Layout(4, CP2 | TP2),
    "cp2_tp2_sp": Layout(4, CP2 | TP2 | SP, quick=True),
    "cp2_tp2_sp_pp2": Layout(8, CP2 | TP2 | SP | PP2),
    "cp2_ep2": Layout(2, CP2 | EP2),
    "cp2_zero": Layout(4, CP2 | ZERO),
    "cp2_ep2_recompute": Layout(2, CP2 | EP2 | MOE),
    "tp2_sp_recompute": Layout(2, TP2 | SP | SELECTIVE, quick=True),
    "cp2_tp2_sp_recompute": Layout(4, CP2 | TP2 | SP | SELECTIVE),
    "tp2_sp_pp2_recompute_full": Layout(4, TP2 | SP | PP2 | FULL),
    "cp2_pp2_recompute_full": Layout(4, CP2 | PP2 | FULL | {"recompute_num_layers": 2}),
    "cp2_pp2_v2": Layout(4, CP2 | PP2 | V2),
    "pp2_v2_documents": Layout(2, PP2 | V2, shared_settings=DOCUMENTS),
    "tp2_sp_pp2_documents": Layout(4, TP2 | SP | PP2, shared_settings=DOCUMENTS, quick=True),
    "pp4_documents": Layout(4, PP4, shared_settings=DOCUMENTS),
    "dp2_zero": Layout(2, ZERO, quick=True, float32=True),
    "dp2_overlap": Layout(2, OVERLAP_GRADS),
    "dp4_zero": Layout(4, ZERO),
    "tp2_dp2_zero_overlap": Layout(4, TP2 | ZERO_OVERLAP),
    "pp2_dp2_zero": Layout(4, PP2 | ZERO_OVERLAP),
    "pp2_v2_dp2_zero": Layout(4, PP2 | V2 | ZERO_OVERLAP),
    "tp2_sp_dp2_zero": Layout(4, TP2 | SP | ZERO_OVERLAP, quick=True),
    "tp2_sp_ep2_etp1_zero_recompute": Layout(4, TP2 | SP | EP2 | ETP1 | ZERO_OVERLAP | FULL),
    "ep2_zero_grads_overlap": Layout(2, EP2 | ZERO_OVERLAP),
    "ep2_zero_offload": Layout(2, EP2 | ZERO_OVERLAP | HALF, quick=True),
    "dp4_zero_offload": Layout(4, ZERO | OFFLOAD),
    "tp2_sp_dp2_offload": Layout(4, TP2 | SP | HALF),
    "pp2_v2_dp2_zero_offload": Layout(4, PP2 | V2 | ZERO_OVERLAP | HALF),
    "cp2_tp2_sp_ep4_etp1_zero_offload": Layout(4, CP2 | TP2 | SP | EP4 | ETP1 | ZERO | OFFLOAD),
    "tp2_sp_pp2_dp2_zero_offload": Layout(8, TP2 | SP | PP2 | ZERO_OVERLAP | HALF),
}
QUICK_OR_SLOW = [pytest.param(name, marks=() if LAYOUTS[name].quick else pytest.mark.slow) for name in LAYOUTS]
QUICK_IN_FLOAT32 = {"tp2_sp_pp2", "tp2_sp_ep2_etp1", "cp2", "dp2_zero"}
"""One of each kind of parallelism: what float32 adds is its kernels and its rounding, not another layout."""
IN_FLOAT32 = [
    pytest.param(name, marks=() if name in QUICK_IN_FLOAT32 else pytest.mark.slow)
    for name in LAYOUTS
    if LAYOUTS[name].float32
]


@functools.cache
def _one_process(params_dtype: str, settings: str):
    return run_distributed(train_tiny, 1, json.loads(settings), params_dtype, STEPS)[0]


def _compare(name: str, params_dtype: str, tolerance: float, weight_tolerance: float) -> None:
    layout = LAYOUTS[name]
    settings = layout.shared_settings | layout.settings
    outcomes = run_distributed(train_tiny, layout.world_size, settings, params_dtype, STEPS)
    reference = _one_process(params_dtype, json.dumps(layout.shared_settings))
    for outcome in outcomes:
        for name, value in reference.numbers[0].items():
            assert outcome.numbers[0][name] == pytest.approx(value, rel=tolerance), name
        assert outcome.numbers == outcomes[0].numbers
    for step, numbers in enumerate(reference.numbers):
        for name, value in numbers.items():
            assert outcomes[0].numbers[step][name] == pytest.approx(value, rel=weight_tolerance), (step, name)
    for kind, bound in (("gradients", tolerance), ("weights", weight_tolerance)):
        ours = join_shards([getattr(outcome, kind) for outcome in outcomes])
        theirs = join_shards([getattr(reference, kind)])
        assert ours.keys() == theirs.keys()
        differences = {name: relative_difference(ours[name], theirs[name]) for name in theirs}
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] <= bound, (kind, worst, differences[worst])
        if kind == "gradients":
            norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm().item()
            assert outcomes[0].numbers[0]["grad_norm"] == pytest.approx(norm, rel=tolerance)


@pytest.mark.parametrize("layout", QUICK_OR_SLOW)
def test_float64_equals_one_process(layout: str) -> None:
    _compare(layout, "float64", 1e-10, 1e-10)


@pytest.mark.parametrize("layout", IN_FLOAT32)
def test_float32_equals_one_process(layout: str) -> None:
    _compare(layout, "float32", 2e-6, 1e-5)
