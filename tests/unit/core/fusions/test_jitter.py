"""The router's noise is uniform, and depends on the place of a token in the run alone."""

from dataclasses import replace

import torch
from model_testing import TINY_MODEL, layer_specs

from megatron.core.fusions.jitter import jittered, mixed
from megatron.core.microbatch import Microbatch
from megatron.core.parallel_state import Group
from megatron.core.tensor_parallel.parameter import Placement
from megatron.core.transformer.moe.router import TopKRouter


def test_splitmix64() -> None:
    # the first outputs of the published generator with seed 0, which mixes 1, 2 and 3 times its increment
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [value % 2**64 for value in mixed(torch.tensor([1, 2, 3])).tolist()] == expected


def test_noise_is_uniform_and_uncorrelated() -> None:
    x = torch.ones(1000, 200, dtype=torch.float64)
    noise = (jittered(x, torch.arange(1000), 0.1) - 0.9) / 0.2
    assert noise.min() >= 0 and noise.max() < 1
    values = noise.flatten().sort().values
    largest = (values - torch.linspace(0, 1, len(values), dtype=torch.float64)).abs().max()  # Kolmogorov-Smirnov
    assert largest < 1.95 / len(values) ** 0.5  # exceeded once in a thousand cases
    centred = noise - noise.mean()
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert shifted.mean().abs() < 4 * shifted.std() / shifted.numel() ** 0.5


def _logsumexp(seed: int = 1, layer: int = 3, first_sample: int = 10, training: bool = True) -> torch.Tensor:
    config = replace(TINY_MODEL, moe_input_jitter_eps=0.1)
    placement = Placement(dtype=torch.float64, device=torch.device("cpu"))
    router = TopKRouter(config, layer, layer_specs(config)["mlp.router.weight"], Group(), placement).train(training)
    torch.nn.init.ones_(router.weight)
    x = torch.ones(5, 4, TINY_MODEL.hidden_size, dtype=torch.float64)
    routing, _ = router(x, Microbatch(seed=seed, first_sample=first_sample, places=torch.arange(20, 25)))
    return routing.logsumexp_T.view(5, 4).detach()


def test_every_token_of_the_run_has_its_own_noise() -> None:
    here = _logsumexp()
    assert here.unique().numel() == 20
    assert torch.equal(here, _logsumexp())
    assert torch.equal(here[:, 2:], _logsumexp(first_sample=12)[:, :2])
    assert not torch.isin(
        here, torch.stack([_logsumexp(seed=2), _logsumexp(layer=4), _logsumexp(first_sample=14)])
    ).any()
    assert _logsumexp(training=False).unique().numel() == 1
