"""Fewer experts than the source has, and experts made of a dense model."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_testing import MakeModel, disk_tensors

import pretrain_gpt
from megatron.core.interchange.element_types import Array
from megatron.core.models.weight_table import WeightRule
from megatron.core.transformer.moe import experts as experts_module
from megatron.training import training
from megatron.training.environment import Environment
from tools.checkpoint import loader_mistral_hf, util, verify
from tools.checkpoint.stream import CHUNK_BYTES
from tools.checkpoint.upcycling_check import check_logits

Capture = pytest.CaptureFixture[str]


def convert(source: Path, target: Path, flags: str, loader: str = "mixtral_hf", saver: str = "mixtral_hf") -> int:
    command = f"--loader {loader} --saver {saver} --load-dir '{source}' --save-dir '{target}' {flags}"
    return util.main(shlex.split(command))


def _assert_kept(source: Path, target: Path, kept: list[list[int]]) -> None:
    old, new = disk_tensors(source), disk_tensors(target)
    for layer, experts in enumerate(kept):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(new[f"{prefix}.gate.weight"], old[f"{prefix}.gate.weight"][experts])
        for number, expert in enumerate(experts):
            for name in ("w1", "w2", "w3"):
                there, here = f"{prefix}.experts.{expert}.{name}.weight", f"{prefix}.experts.{number}.{name}.weight"
                assert torch.equal(new[here], old[there])
    assert len(new) == len(old) - sum(3 * (8 - len(experts)) for experts in kept)
    config = json.loads((target / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "num_local_experts": len(kept[0])}


def test_listed_experts_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    source = make_model(experts=8)
    assert convert(source, tmp_path / "hf", "--keep-experts 0,2,5,7") == 0
    _assert_kept(source, tmp_path / "hf", [[0, 2, 5, 7]] * 4)
    flags = "--keep-experts 0,2,5,7 --target-tensor-parallel-size 2 --target-expert-parallel-size 2"
    assert convert(source, tmp_path / "m", flags, saver="mixtral") == 0
    assert verify.main(["--huggingface-path", str(tmp_path / "hf"), "--megatron-path", str(tmp_path / "m")]) == 0
    loaded: Any = MixtralForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loaded[1].values())


def test_the_busiest_experts_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    source, statistics = make_model(experts=8), tmp_path / "stats.json"
    load = [[0, 1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 5, 5], [1, 0, 3, 0, 5, 0, 7, 0]]
    statistics.write_text(json.dumps({"tokens_per_expert": load}))
    assert convert(source, tmp_path / "hf", f"--keep-experts best:4 --routing-stats '{statistics}'") == 0
    _assert_kept(source, tmp_path / "hf", [[4, 5, 6, 7], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 4, 6]])
    steps = [{"iteration": 1, "tokens_per_expert": load}, {"iteration": 1, "valid_loss": 3.0}]
    steps.append({"iteration": 2, "tokens_per_expert": [[8, 0, 0, 0, 0, 0, 0, 0], *load[1:]]})
    statistics.write_text("\n".join(map(json.dumps, steps)) + "\n")
    assert convert(source, tmp_path / "hf2", f"--keep-experts best:4 --routing-stats '{statistics}'") == 0
    _assert_kept(source, tmp_path / "hf2", [[0, 5, 6, 7], [0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 4, 6]])


def test_the_busiest_experts_of_a_training_run(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's own statistic and checkpoint, against a choice made by hand."""
    model = make_model(experts=8)
    rope = json.loads((model / "config.json").read_text())["rope_parameters"]["rope_theta"]
    flags = (
        f"--num-layers 4 --hidden-size 32 --ffn-hidden-size 24 --num-attention-heads 8 --num-query-groups 4 "
        f"--num-experts 8 --rotary-base {rope} --seq-length 16 --max-position-embeddings 64 --vocab-size 150 "
        "--tokenizer-type NullTokenizer --mock-data --micro-batch-size 2 --train-iters 4 --lr 0.01 --eval-interval 0 "
        f"--bf16 --device cpu --save '{tmp_path}/run' --metrics-path '{tmp_path}/log' --moe-per-layer-logging"
    )
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *shlex.split(flags)])
    alone = Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    training._pretrain(alone, pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
    steps = [json.loads(line)["tokens_per_expert"] for line in (tmp_path / "log").read_text().splitlines()]
    load = np.array(steps).sum(axis=0)
    assert load.shape == (4, 8) and load.sum() == 4 * 4 * 2 * 16 * 2  # layers, steps, sequences, tokens, experts each
    by_hand = [sorted(np.argsort(-counts, kind="stable")[:4].tolist()) for counts in load]
    assert len(set(map(tuple, by_hand))) > 1, "layers that choose alike show nothing"
    more = f"--huggingface-config-path '{model}'"
    assert convert(tmp_path / "run", tmp_path / "eight", more, loader="mixtral") == 0
    more += f" --keep-experts best:4 --routing-stats '{tmp_path}/log'"
    assert convert(tmp_path / "run", tmp_path / "four", more, loader="mixtral") == 0
    _assert_kept(tmp_path / "eight", tmp_path / "four", by_hand)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep-experts 0,8", "experts 0 to 7"),
        ("--keep-experts 1,1", "can be kept once"),
        ("--keep-experts some", "neither a list"),
        ("--keep-experts 3", "each token goes to 2"),
        ("--keep-experts best:4", "needs --routing-stats"),
        ("--keep-experts 0,1 --routing-stats STATS", "best:N only"),
        ("--keep-experts best:9 --routing-stats STATS", "has 8 experts"),
        ("--keep-experts best:4 --routing-stats /nowhere", "/nowhere"),
        ("--keep-experts best:4 --routing-stats WRONG", "4 lists (layers) of 8 numbers"),
        ("--keep-experts best:4 --routing-stats BROKEN", "is not JSON"),
    ],
)
def test_choices_that_make_no_sense(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: str, message: str
) -> None:
    (tmp_path / "s").write_text(json.dumps({"tokens_per_expert": [[1] * 8] * 4}))
    (tmp_path / "w").write_text(json.dumps({"tokens_per_expert": [[1] * 8] * 3}))
    (tmp_path / "b").write_text("{")
    for word, name in (("STATS", "s"), ("WRONG", "w"), ("BROKEN", "b")):
        flags = flags.replace(word, f"'{tmp_path / name}'")
    assert convert(make_model(experts=8), tmp_path / "hf", flags) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("error: ") == 1 and not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=150, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, sliding_window=None,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return folder


def test_upcycled_logits_are_the_dense_models(dense: Path, tmp_path: Path, capsys: Capture) -> None:
    """transformers on both sides, and our tool's own check at a layout."""
    from transformers import MistralForCausalLM, MixtralForCausalLM

    assert convert(dense, tmp_path / "hf", "--num-experts 4", loader="mistral_hf") == 0
    assert "logits before noise equal the dense model's" in capsys.readouterr().out
    tokens = torch.arange(40).view(2, 20)
    loaded: Any = MixtralForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loaded[1].values())
    with torch.no_grad():
        expected = MistralForCausalLM.from_pretrained(dense)(tokens).logits
        torch.testing.assert_close(loaded[0](tokens).logits, expected, rtol=1e-4, atol=1e-4)
    flags = "--num-experts 4 --target-expert-parallel-size 2"
    assert convert(dense, tmp_path / "m", flags, loader="mistral_hf", saver="mixtral") == 0
    arguments = ["--huggingface-path", str(dense), "--megatron-path", str(tmp_path / "m"), "--logits", "--tokens", "8"]
    assert verify.main(arguments) == 0


def test_noise_tells_experts_apart_at_every_layout_alike(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--num-experts 4 --expert-noise 0.01 --seed 5"
    assert convert(dense, tmp_path / "hf", flags, loader="mistral_hf") == 0
    tensors, original = disk_tensors(tmp_path / "hf"), disk_tensors(dense)
    for name, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        experts = [tensors[f"model.layers.1.block_sparse_moe.experts.{e}.{ours}.weight"] for e in range(4)]
        for expert in experts:
            noise = expert - original[f"model.layers.1.mlp.{name}.weight"]
            assert 0.008 < float(noise.std()) < 0.012 and abs(float(noise.mean())) < 0.002
        assert not torch.equal(experts[0], experts[1])
    assert torch.equal(
        tensors["model.layers.1.self_attn.q_proj.weight"], original["model.layers.1.self_attn.q_proj.weight"]
    )
    monkeypatch.setattr("tools.checkpoint.stream.CHUNK_BYTES", CHUNK_BYTES >> 14)
    more = "--target-tensor-parallel-size 2 --target-expert-parallel-size 2 --no-check-logits"
    assert convert(dense, tmp_path / "m", f"{flags} {more}", loader="mistral_hf", saver="mixtral") == 0
    assert verify.main(["--huggingface-path", str(tmp_path / "hf"), "--megatron-path", str(tmp_path / "m")]) == 0


def test_the_check_of_logits_can_fail(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that is not the others' equal, and chosen experts whose weights do not sum to one."""

    class Different(loader_mistral_hf.UpcycledSource):
        def read(self, rule: WeightRule, rows: range, out: Array | None = None) -> Array:
            array = super().read(rule, rows, out)
            return array * 1.001 if rule.layer == 1 and rule.expert == 2 else array

    assert check_logits(loader_mistral_hf.UpcycledSource(dense, 4)) < 1e-9
    with pytest.raises(ValueError, match="expert 2 differs from expert 0"):
        check_logits(Different(dense, 4))
    experts = experts_module.expert_mlp
    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "expert_mlp", lambda x, probs, *more: experts(x, probs * 0.999, *more))
        with pytest.raises(ValueError, match="differ from the dense model's by"):
            check_logits(loader_mistral_hf.UpcycledSource(dense, 4))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-experts 1", "--moe-router-topk must be between 1 and"),
        ("--num-experts 4 --expert-noise -1", "--expert-noise must be"),
        ("--num-experts 4 --expert-noise nan", "--expert-noise must be"),
    ],
)
def test_upcycling_refusals(
    dense: Path, make_model: MakeModel, tmp_path: Path, capsys: Capture, flags: str, message: str
) -> None:
    assert convert(dense, tmp_path / "hf", flags, loader="mistral_hf") == 1
    assert message in capsys.readouterr().err
    assert convert(make_model(), tmp_path / "hf", "--num-experts 4", loader="mistral_hf") == 1
    assert "a dense Mistral is needed" in capsys.readouterr().err and not (tmp_path / "hf").exists()
