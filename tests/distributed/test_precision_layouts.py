"""Masters and moments in fewer bits under several layouts.

A float32 that differs in its last bit may be rounded to the neighbour of a number with few bits, so 1e-10 of float64
cannot be asked. What holds: remainders are the float32 masters in every layout, bit for bit; and after the second
update, the first that reads moments, weights are those of one process within 1e-5, or 1e-3 where moments are in FP8.
(In later steps one token that goes to another expert is a larger difference than all rounding.)
"""

from typing import Any

import pytest
import torch
from distributed_testing import run_distributed
from model_testing import StepOutcome, join_shards, relative_difference, train_tiny
from test_layouts import CP2, EP2, ETP1, PP2, SP, TP2, ZERO, ZERO_OVERLAP

AWARE = {"use_precision_aware_optimizer": True}
REMAINDERS = AWARE | {"main_params_dtype": "bf16-remainder"}
MOMENTS: list[dict[str, Any]] = [
    AWARE | {"exp_avg_dtype": first, "exp_avg_sq_dtype": second}
    for first, second in (("bf16", "bf16"), ("fp16", "fp16"), ("fp8", "fp8"), ("fp8", "fp16"))
]
# experts of which a block of 64 numbers may hold two
UNEVEN = {"ffn_hidden_size": 50}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2_zero": (2, ZERO),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "cp2_zero": (2, CP2 | ZERO),
    "tp2_sp_ep2_etp1": (2, TP2 | SP | EP2 | ETP1),
    "tp2_sp_dp2_zero_overlap": (4, TP2 | SP | ZERO_OVERLAP),
    "pp2_ep2_zero": (4, PP2 | EP2 | ZERO),
}


Trained = tuple[list[StepOutcome], list[StepOutcome]]


def _train_all(rank: int, world_size: int, layout: dict[str, Any]) -> Trained:
    """Runs in the layout, and on the first rank those of one process that they are compared with."""
    in_bfloat16 = [layout | settings for settings in (AWARE, REMAINDERS)]
    runs = [(settings, "bfloat16") for settings in in_bfloat16] + [(layout | each, "float32") for each in MOMENTS]
    ours = [train_tiny(rank, world_size, UNEVEN | settings, dtype, 2) for settings, dtype in runs]
    alone = [train_tiny(0, 1, UNEVEN | moments, "float32", 2) for moments in MOMENTS if rank == 0]
    return ours, alone


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "dp2_zero" else pytest.mark.slow) for name in LAYOUTS]
)
def test_layouts_agree(name: str) -> None:
    trained: list[Trained] = run_distributed(_train_all, *LAYOUTS[name])
    for (wide, split, *_), _ in trained:
        assert split.numbers == wide.numbers
        for key, (weight, *_) in wide.weights.items():
            assert torch.equal(split.weights[key][0], weight), key
    for number, (moments, alone) in enumerate(zip(MOMENTS, trained[0][1], strict=True)):
        ours = join_shards([outcomes[2 + number].weights for outcomes, _ in trained])
        theirs = join_shards([alone.weights])
        differences = {key: relative_difference(ours[key], theirs[key]) for key in theirs}
        worst = max(differences, key=lambda key: differences[key])
        bound = 1e-3 if "fp8" in moments.values() else 1e-5
        assert differences[worst] <= bound, (moments, worst, differences[worst])
