"""Every layout trains the same model: loss, auxiliary losses, every gradient, and weights after five steps."""

import functools

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import join_shards, relative_difference, train_tiny

from megatron.core.config import ParallelConfig

STEPS = 5
LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_sp_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "pp2_dp2": (4, {"pipeline_model_parallel_size": 2}),
}


@functools.cache
def _one_process(params_dtype: str):
    return run_distributed(train_tiny, 1, ParallelConfig(), params_dtype, STEPS)[0]


def _compare(layout: str, params_dtype: str, tolerance: float, weight_tolerance: float) -> None:
    world_size, settings = LAYOUTS[layout]
    outcomes = run_distributed(train_tiny, world_size, ParallelConfig(**settings), params_dtype, STEPS)
    reference = _one_process(params_dtype)
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_equals_one_process(layout: str) -> None:
    _compare(layout, "float64", 1e-10, 1e-10)


@pytest.mark.parametrize("layout", ["tp2", "tp2_sp", "pp2", "dp2", "tp2_pp2", "tp2_sp_pp2"])
def test_float32_equals_one_process(layout: str) -> None:
    _compare(layout, "float32", 2e-6, 1e-5)
