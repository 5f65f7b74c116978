"""No position sees a later one, in attention or in routing."""

import torch
from model_testing import TINY_MODEL

from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import initialize_parameters


def test_a_changed_token_changes_only_what_follows() -> None:
    model = MixtralModel(TINY_MODEL, groups=ProcessGroups(), sequence_parallel=False, device=torch.device("cpu"))
    initialize_parameters(model, 0, 3)
    tokens = torch.randint(0, 203, (2, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 203
    with torch.no_grad():
        before, after = model(tokens).tensor, model(changed).tensor
    difference = (before - after).abs().amax(dim=-1)
    assert difference[0, :7].max() < 1e-12 and difference[1].max() < 1e-12
    assert difference[0, 7:].min() > 1e-6
