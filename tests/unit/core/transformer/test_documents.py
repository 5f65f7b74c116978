"""Documents of one sample that must not see each other: as if each were trained alone."""

import itertools
from typing import Any

import torch
from model_testing import TINY_MODEL
from torch import Tensor

from megatron.core.fusions.attention import Documents
from megatron.core.microbatch import GradientFactors, Microbatch
from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups
from megatron.core.tensor_parallel.parameter import initialize_parameters

LENGTHS = (5, 9, 2)
BOUNDS = list(itertools.accumulate(LENGTHS, initial=0))


def model() -> MixtralModel:
    built = MixtralModel(TINY_MODEL, groups=ProcessGroups(), sequence_parallel=False, device=torch.device("cpu"))
    initialize_parameters(built, 0, 3)
    return built


def text() -> Tensor:
    return torch.randint(0, 203, (1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(2))


def losses(model: MixtralModel, tokens: Tensor, reset_positions: bool = True) -> Tensor:
    """Loss of each token, without auxiliary losses (which look at the whole microbatch)."""
    documents = Documents.from_bounds(torch.tensor(BOUNDS, dtype=torch.int32), torch.device("cpu"))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0) if reset_positions else None
    return token_losses(model, tokens, position_ids=positions, documents=documents)


def token_losses(model: MixtralModel, tokens: Tensor, **parts: Any) -> Tensor:
    microbatch = Microbatch(labels=tokens[:, 1:], factors=GradientFactors(loss_scale=0.0), **parts)
    return model(tokens[:, :-1], microbatch).tensor


def test_losses_and_gradients_equal_those_of_each_document_alone() -> None:
    together, alone, tokens = model(), model(), text()
    packed = losses(together, tokens)
    packed.sum().backward()
    for start, stop in itertools.pairwise(BOUNDS):
        loss = token_losses(alone, tokens[:, start : stop + 1])
        torch.testing.assert_close(packed[:, start:stop], loss, rtol=1e-12, atol=1e-12)
        loss.sum().backward()
    gradients = dict(alone.named_parameters())
    for name, parameter in together.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-9, atol=1e-10, msg=name)


def test_a_changed_token_moves_nothing_in_other_documents() -> None:
    built, tokens = model(), text()
    with torch.no_grad():
        before = losses(built, tokens)
        tokens[0, 2] = (tokens[0, 2] + 1) % 203
        after = losses(built, tokens)
    difference = (before - after).abs()[0]
    assert difference[BOUNDS[1] :].max() < 1e-12
    assert difference[2 : BOUNDS[1]].min() > 1e-6


def test_no_gradient_reaches_other_documents() -> None:
    built = model()
    tokens = torch.randperm(203, generator=torch.Generator().manual_seed(4))[: sum(LENGTHS) + 1].unsqueeze(0)
    losses(built, tokens)[:, BOUNDS[1] : BOUNDS[2]].sum().backward()
    assert built.embedding is not None
    rows = built.embedding["word_embeddings"].weight.grad[tokens[0, :-1]].abs().amax(dim=1)
    assert rows[BOUNDS[1] : BOUNDS[2]].min() > 0
    assert not rows[: BOUNDS[1]].any() and not rows[BOUNDS[2] :].any()


def test_positions_that_are_not_reset_change_only_rounding() -> None:
    """Rotary attention depends on differences of positions alone."""
    built, tokens = model(), text()
    with torch.no_grad():
        torch.testing.assert_close(
            losses(built, tokens, reset_positions=False), losses(built, tokens), rtol=1e-10, atol=1e-10
        )


def test_reset_positions_alone_change_attention() -> None:
    """Documents that see each other at the same positions: another result than with rising ones."""
    built, tokens = model(), text()
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    with torch.no_grad():
        rising = token_losses(built, tokens)
        same = token_losses(built, tokens, position_ids=torch.arange(16).unsqueeze(0))
        reset = token_losses(built, tokens, position_ids=positions)
    assert torch.equal(rising, same)
    difference = (rising - reset).abs()[0]
    assert difference[: LENGTHS[0]].max() < 1e-12 and difference[LENGTHS[0] :].min() > 1e-9
