"""A trained checkpoint of either format, converted to Hugging Face: transformers computes the same logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_testing import save, tiny_trainer, train
from closeness import relative_error
from distributed_testing import run_distributed
from model_testing import SEQ_LENGTH, TINY_MODEL, tiny_arguments
from safetensors.torch import load_file
from test_layouts import EP2, ETP1, PP2, SP, TP2

from megatron.core.models.mixtral.mixtral_model import MixtralModel
from megatron.core.parallel_state import ProcessGroups, build_process_groups
from megatron.core.tensor_parallel.parameter import named_shards
from megatron.training.progress import Progress
from tools.checkpoint import convert_megatron_to_hf_mixtral, util, verify

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "tp2_ep2": (4, TP2 | SP | EP2 | {"pipeline_model_parallel_size": 1}),
    "tp2_ep2_etp1_uneven_pp2": (4, TP2 | SP | EP2 | ETP1 | PP2 | {"decoder_first_pipeline_num_layers": 1}),
}
FORMATS = ("torch", "sharded")


def _train_and_save(rank: int, world_size: int, settings: dict, folder: str) -> None:
    """Two steps, saved in both formats."""
    arguments = tiny_arguments("float32", settings)
    groups = build_process_groups(arguments.parallel, rank, world_size) if world_size > 1 else ProcessGroups()
    progress = Progress()
    trainer = tiny_trainer(arguments, groups)
    train(trainer, progress, 2)
    for kind in FORMATS:
        checkpoint = replace(arguments.checkpoint, save=f"{folder}/{kind}", ckpt_format=kind)
        saving = replace(trainer, arguments=replace(arguments, checkpoint=checkpoint))
        save(saving, progress)


def _config(folder: Path) -> Path:
    from transformers import MixtralConfig

    model = TINY_MODEL
    config = MixtralConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_attention_heads, head_dim=model.head_dim,
        num_key_value_heads=model.query_groups, num_local_experts=model.num_experts, rms_norm_eps=model.norm_epsilon,
        num_experts_per_tok=model.moe_router_topk, max_position_embeddings=SEQ_LENGTH, rope_theta=model.rotary_base,
        torch_dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "layout", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[:2]), list(LAYOUTS)[2]]
)
def test_both_formats_become_the_trained_model(tmp_path: Path, layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    run_distributed(_train_and_save, world_size, settings, str(tmp_path))
    config = _config(tmp_path / "config")
    for kind in FORMATS:
        flags = ["--megatron-checkpoint-path", str(tmp_path / kind)]
        if kind == "sharded":  # the other one's config is made from its arguments
            flags += ["--huggingface-config-path", str(config)]
        out = tmp_path / f"hf-{kind}"
        assert convert_megatron_to_hf_mixtral.main([*flags, "--huggingface-checkpoint-path", str(out)]) == 0
        flags = ["--loader", "mixtral", "--load-dir", str(tmp_path / kind), "--saver"]
        changed, for_megatron_lm = f"{tmp_path / kind}-1", f"{tmp_path / kind}-2"
        assert util.main([*flags, "mixtral", "--save-dir", changed, "--target-expert-parallel-size", "2"]) == 0
        assert util.main([*flags, "mixtral_torch_dist", "--save-dir", for_megatron_lm]) == 0
        for folder in (str(tmp_path / kind), changed, for_megatron_lm):
            assert verify.main(["--huggingface-path", str(out), "--megatron-path", folder]) == 0
    first, second = (load_file(tmp_path / f"hf-{kind}" / "model.safetensors") for kind in FORMATS)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)
    for kind in FORMATS:
        _compare_logits(tmp_path / "sharded" / "iter_0000002", tmp_path / f"hf-{kind}")


@torch.no_grad()
def _compare_logits(step: Path, folder: Path) -> None:
    """The weights in the checkpoint, put into our model by their global names, against transformers'."""
    from transformers import MixtralForCausalLM

    from megatron.core.dist_checkpointing import CheckpointReader

    model = MixtralModel(
        replace(TINY_MODEL, params_dtype="float32"),
        groups=ProcessGroups(),
        sequence_parallel=False,
        device=torch.device("cpu"),
    )
    padded = model.embedding["word_embeddings"].weight.shape[0]  # type: ignore[index, union-attr]
    with CheckpointReader(step) as reader:
        for shard in named_shards(model, 0):
            vocabulary = shard.spec.init_rows is not None
            shard.data.copy_(reader.read(shard.global_name, padded_length=padded if vocabulary else None))
    assert TINY_MODEL.vocab_size is not None
    tokens = torch.randint(TINY_MODEL.vocab_size, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(1))
    loaded: Any = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded[1].values())
    expected = loaded[0](tokens).logits
    ours = model(tokens).tensor
    assert relative_error(ours, expected) < 1e-5
