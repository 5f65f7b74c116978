"""All layers of the MoE benchmark are the same function, and the table is printed."""

from dataclasses import replace

import pytest
import torch
from closeness import relative_error

from megatron.core.config import ModelConfig
from megatron.core.models.flops import training_flops_per_token
from megatron.core.models.mixtral.weights import mixtral_table
from tools.benchmarks.moe_contestants import OURS, Weights, contestants, loop
from tools.benchmarks.moe_layer import check_equal, layer_flops, main, saved_bytes

CONFIG = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=24, num_attention_heads=1, num_experts=4)
CPU = torch.device("cpu")


def test_contestants_have_the_same_output_and_gradients() -> None:
    layers, absent = contestants(CONFIG, CPU)
    assert len(layers) == 6 and list(absent) == [f"{OURS}, persistent"]
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 9, 16, generator=generator)
    check_equal(layers, x, 1e-5)
    gradients = []
    for layer in layers.values():
        own = x.clone().requires_grad_()
        layer.forward(own).backward(grad)
        router = layer.parameters[0].grad
        assert own.grad is not None and router is not None
        gradients.append((own.grad, router))
    for found in gradients[1:]:
        for a, b in zip(found, gradients[0], strict=True):
            assert relative_error(a, b) < 1e-5
    weights = Weights.drawn(CONFIG, CPU)
    layers["another"] = loop(CONFIG, replace(weights, down_EHF=weights.down_EHF * 1.01))
    with pytest.raises(ValueError, match=r"another computes something else: relative difference 1\.0e-02"):
        check_equal(layers, x, 1e-5)


def test_what_is_kept_and_the_operations() -> None:
    layers, _ = contestants(CONFIG, CPU)
    x = torch.randn(9, 16, requires_grad=True)
    ours, plain = (saved_bytes(layers[name], x) for name in (f"{OURS}, loop", "torch grouped_mm"))
    rows = 18
    experts_keep = 4 * (9 * 16 + rows * 2 * 24 + rows) + 8 * 2 * rows + 4 * 4  # x, h, p, two maps, ends
    assert experts_keep <= ours <= experts_keep + 4 * 9 * (4 + 2 + 1) * 4  # and a few numbers a token of the router
    assert ours < 0.6 * plain
    # a whole model of this layer also has an attention and a vocabulary
    model = replace(CONFIG, vocab_size=1)
    whole = training_flops_per_token(model, mixtral_table(model), 8)
    attention_and_output = 6 * (4 * 16 * 16 + 2 * 16 * 4.5 + 16)
    assert 3 * layer_flops(CONFIG, 5) == 5 * (whole - attention_and_output)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--device cpu --hidden-size 16 --ffn-hidden-size 24 --tokens 5 --experts 4 --rounds 1"
    assert main(flags.split()) == 0
    out = capsys.readouterr().out
    names = ("this project, loop", "loop of products", "torch grouped_mm", "transformers, eager")
    for name in (*names, "weight gradient, tiles"):
        assert any(line.strip().startswith(name) for line in out.splitlines()), name
    assert main([*flags.split(), "--hidden-size", "18"]) == 1
    assert "grouped_mm does not take experts" in capsys.readouterr().err
