"""The model equals transformers' Mixtral: logits of converted checkpoints at several layouts, and every gradient."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from closeness import relative_error
from distributed_testing import run_distributed
from model_testing import tiny_arguments
from torch import Tensor

import pretrain_gpt
from megatron.core.config import ParallelConfig
from megatron.core.microbatch import Microbatch
from megatron.core.models.mixtral.hf_config import model_config_from_hf
from megatron.core.models.mixtral.weights import mixtral_weights
from megatron.core.models.weight_table import WeightRule
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.pipeline_parallel.runner import forward_backward
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.checkpoints.source import load_checkpoint, locate_checkpoint
from megatron.training.config import CheckpointConfig
from megatron.training.setup import build_trainer
from tools.checkpoint import util

LAYOUTS = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)]


def _tokens() -> Tensor:
    return torch.randint(0, 150, (2, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=150, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=4, max_position_embeddings=64, rope_theta=5000.0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return folder


def _logits(rank: int, world_size: int, load: str, hf: str, layout: tuple[int, int, bool]) -> Tensor | None:
    """Logits of the converted model, from the ranks of the last stage."""
    tp, pp, sequence_parallel = layout
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel
    )
    groups = build_process_groups(parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    arguments = replace(
        tiny_arguments("float32"),
        parallel=parallel,
        model=replace(model_config_from_hf(json.loads((Path(hf) / "config.json").read_text())), params_dtype="float32"),
        checkpoint=CheckpointConfig(load=load),
    )
    trainer = build_trainer(
        arguments, groups, torch.device("cpu"), pretrain_gpt.model_provider, pretrain_gpt.forward_step
    )
    source = locate_checkpoint(arguments, groups)
    load_checkpoint(source, trainer)

    def forward(_microbatch: int, _chunk: int, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        output = trainer.model[0](_tokens() if hidden is None else hidden).tensor
        return output, output

    (output,) = forward_backward(
        forward,
        pipeline=trainer.pipeline,
        rank=groups.pp.rank,
        num_microbatches=1,
        link=trainer.link,
        forward_only=True,
    )
    return output if groups.pp.is_last else None


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_of_the_converted_model(hf_folder: Path, tmp_path: Path, layout: tuple[int, int, bool]) -> None:
    from transformers import MixtralForCausalLM

    tp, pp, _ = layout
    command = f"--loader mixtral_hf --saver mixtral --load-dir '{hf_folder}' --save-dir '{tmp_path}/megatron'"
    sizes = f"--target-tensor-parallel-size {tp} --target-pipeline-parallel-size {pp}"
    assert util.main(shlex.split(f"{command} {sizes}")) == 0
    results = run_distributed(_logits, tp * pp, str(tmp_path / "megatron"), str(hf_folder), layout)
    with torch.no_grad():
        expected = MixtralForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)(_tokens()).logits
    last_stage = [result for result in results if result is not None]
    assert len(last_stage) == tp
    for logits in last_stage:
        assert logits.shape == expected.shape
        assert relative_error(logits, expected) <= 1e-5
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_every_gradient_equals_transformers(hf_folder: Path) -> None:
    """Loss and gradients of the language-model loss in float64, through the table of names."""
    from transformers import MixtralForCausalLM

    theirs = MixtralForCausalLM.from_pretrained(hf_folder, dtype=torch.float64, experts_implementation="eager")
    config = model_config_from_hf(theirs.config.to_dict())
    arguments = replace(tiny_arguments(), model=replace(config, params_dtype="float64"))
    ours = pretrain_gpt.model_provider(arguments, ProcessGroups(), torch.device("cpu"))
    rules = {rule.name: rule for rule in mixtral_weights(config, config.padded_vocab_size(1))}
    values = _in_disk_spelling({name: p.detach() for name, p in theirs.named_parameters()}, config.ffn_hidden_size)
    for shard in named_shards(ours, 0):
        rule = rules[shard.global_name]
        shard.data.copy_(_together(rule, values))
        assert (rule.partition_dim, rule.partition_stride) == (shard.spec.partition_dim, shard.spec.partition_stride)
    assert {shard.global_name for shard in named_shards(ours, 0)} == rules.keys()

    tokens = _tokens()
    loss = ours(tokens[:, :-1], Microbatch(labels=tokens[:, 1:])).tensor.mean()
    loss.backward()
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # transformers computes the loss in float32
    for parameter in ours.parameters():
        assert parameter.grad is not None
        parameter.data.copy_(parameter.grad)
    gradients = _in_disk_spelling(
        {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}, config.ffn_hidden_size
    )
    for shard in named_shards(ours, 0):
        rule = rules[shard.global_name]
        reference = _together(rule, gradients)
        assert relative_error(shard.data, reference) <= 1e-5, shard.global_name


def _together(rule: WeightRule, tensors: dict[str, Tensor]) -> Tensor:
    """One of our weights from Hugging Face's tensors by name."""
    whole = torch.zeros(rule.shape, dtype=tensors[rule.sources[0].name].dtype)
    for source, view in zip(rule.sources, rule.source_views(whole), strict=True):
        view.copy_(tensors[source.name].reshape(view.shape))
    return whole


def _in_disk_spelling(tensors: dict[str, Tensor], ffn: int) -> dict[str, Tensor]:
    """Unstacks the experts of transformers 5."""
    result = {}
    for name, tensor in tensors.items():
        layer = name.partition(".mlp.")[0]
        if name.endswith("mlp.gate.weight"):
            result[f"{layer}.block_sparse_moe.gate.weight"] = tensor
        elif name.endswith("experts.gate_up_proj"):
            for expert, gate_up in enumerate(tensor):
                result[f"{layer}.block_sparse_moe.experts.{expert}.w1.weight"] = gate_up[:ffn]
                result[f"{layer}.block_sparse_moe.experts.{expert}.w3.weight"] = gate_up[ffn:]
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                result[f"{layer}.block_sparse_moe.experts.{expert}.w2.weight"] = down
        else:
            result[name] = tensor
    return result
