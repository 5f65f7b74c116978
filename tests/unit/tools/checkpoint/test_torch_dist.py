"""Megatron-LM's torch_dist folders convert to Hugging Face bit for bit, whatever layout and version wrote them."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_testing import MakeModel, assert_same_tensors, disk_tensors
from torch_dist_testing import LOCAL_NORM, Pieces, pieces_of_model, save_torch_dist

from megatron.core.interchange.element_types import to_torch
from megatron.core.interchange.torch_dist.names import key_of, state_keys
from megatron.core.models.mixtral.weights import mixtral_weights
from tools.checkpoint import convert_megatron_to_hf_mixtral, saver_mixtral_torch_dist, util
from tools.checkpoint.loader_mixtral_hf import HuggingFaceSource

Capture = pytest.CaptureFixture[str]


def write_model(
    model: Path,
    folder: Path,
    *,
    tp: int = 2,
    padded: int = 160,
    extra: dict[str, Pieces] | None = None,
    arguments: dict[str, Any] | None = None,
    common_state: bool = False,
    files: int = 2,
    **options: object,
) -> None:
    """The weights of a Hugging Face folder as Megatron-LM would have trained them, in a step's folder."""
    source = HuggingFaceSource(model)
    config = source.description.model
    tensors = pieces_of_model(
        mixtral_weights(config, padded),
        lambda rule: to_torch(source.read(rule, range(rule.shape[0])), source.description.dtype),
        tp=tp,
        **options,  # type: ignore[arg-type]
    )
    args = argparse.Namespace(
        **{name: getattr(config, name) for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_experts",
            "moe_router_topk", "max_position_embeddings", "norm_epsilon",
        )},
        rotary_base=int(config.rotary_base), group_query_attention=True, padded_vocab_size=padded, vocab_size=None,
        kv_channels=config.head_dim, tensor_model_parallel_size=tp, params_dtype=torch.bfloat16,
    )  # fmt: skip
    vars(args).update(arguments or {})
    args.attention_backend = pytest.approx  # an object of a class that is not plain
    save_torch_dist(folder, {**tensors, **(extra or {})}, args, common_state=common_state, files=files)


def to_huggingface(step: Path, model: Path, target: Path) -> int:
    return convert_megatron_to_hf_mixtral.main(
        f"--megatron-checkpoint-path {step} --huggingface-config-path {model} "
        f"--huggingface-checkpoint-path {target}".split()
    )


@pytest.mark.parametrize(
    ("options", "made"),
    [
        ({}, {}),
        ({"norms": LOCAL_NORM, "tp": 1, "files": 1, "padded": 150}, {"dtype": torch.float32}),
        ({"norms": {}, "prefix": "model.module.", "common_state": True, "tp": 4}, {"experts": 8}),
        ({"per_layer": True, "files": 3}, {}),
        ({"whole": True}, {}),
    ],
    ids=["as main", "local layers", "0.19, prefixes", "layers apart", "one chunk"],
)
def test_a_folder_converts_bit_for_bit(
    make_model: MakeModel, tmp_path: Path, options: dict[str, object], made: dict[str, object]
) -> None:
    model, step = make_model(**made), tmp_path / "run" / "iter_0000007"
    write_model(model, step, **options)  # type: ignore[arg-type]
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert to_huggingface(tmp_path / "run", model, tmp_path / "out") == 0
    assert_same_tensors(tmp_path / "out", disk_tensors(model))
    assert util.main(f"--loader mixtral --saver mixtral --load-dir {step} --save-dir {tmp_path / 'torch'} "
                     "--target-tensor-parallel-size 2 --true-vocab-size 150".split()) == 0  # fmt: skip
    assert to_huggingface(tmp_path / "torch", model, tmp_path / "again") == 0
    assert_same_tensors(tmp_path / "again", disk_tensors(model))


@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
@pytest.mark.parametrize("made", [{}, {"experts": 8, "dtype": torch.float32}], ids=["4 in bfloat16", "8 in float32"])
def test_pytorch_reads_what_is_written(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, implementation: str, made: dict[str, Any]
) -> None:
    monkeypatch.setattr(saver_mixtral_torch_dist, "_BYTES_OF_FILE", 30_000)
    model = make_model(**made)
    command = f"--loader mixtral_hf --saver mixtral_torch_dist --load-dir {model} --save-dir {tmp_path / 'run'}"
    assert util.main([*command.split(), "--target-transformer-impl", implementation]) == 0
    step = tmp_path / "run" / "release"
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert len(list(step.glob("*.distcp"))) > 3
    metadata = dcp.FileSystemReader(step).read_metadata()
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else None
        for key, entry in metadata.state_dict_metadata.items()
    }
    dcp.load(state, checkpoint_id=step, no_dist=True)
    source = HuggingFaceSource(model)
    for rule in mixtral_weights(source.description.model, 256):
        key, at = key_of(rule, implementation)
        expected = to_torch(source.read(rule, range(rule.shape[0])), source.description.dtype)
        assert torch.equal(state[key][at], expected), (key, at)
    state = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    assert set(state) == set(state_keys(4, source.description.model.num_experts, implementation))
    assert all(value == [None] for value in state.values())
    common = torch.load(step / "common.pt", weights_only=False)
    assert common["args"].num_layers == 4 and common["args"].padded_vocab_size == 256
    assert to_huggingface(tmp_path / "run", model, tmp_path / "out") == 0
    assert_same_tensors(tmp_path / "out", disk_tensors(model))


def test_what_optimizers_saved_is_left_out(make_model: MakeModel, tmp_path: Path, capsys: Capture) -> None:
    """In the kinds that Megatron-LM saves: bound to the layout, for any, of several optimizers, and by NeMo."""
    model, step = make_model(), tmp_path / "iter_0000007"
    numbers: Pieces = [((0, 0), torch.randn(4, 32))]
    for key in (
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg",
        "chained_1.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_0.bucket_idx_0.param",
        "optimizer.state.exp_avg.decoder.final_layernorm.weight",
        "chained_0.optimizer.state.fp32_param.decoder.final_layernorm.weight",
        "optimizer.state.exp_avg_sq.module.decoder.layers.mlp.router.weight",
        "optimizer.state.step.decoder.final_layernorm.weight",
    ):
        shutil.rmtree(step, ignore_errors=True)
        write_model(model, step, prefix="module." if ".module." in key else "", extra={key: numbers})
        assert to_huggingface(step, model, tmp_path / key[:40]) == 0
        assert_same_tensors(tmp_path / key[:40], disk_tensors(model))
        assert capsys.readouterr().err.count("note: the optimizer's state in ") == ("step" not in key), key


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"extra": {"decoder.layers.mlp.shared_experts.linear_fc1.weight": [((0, 0), torch.zeros(4, 2))]}},
         "has tensors that a Mixtral model does not: decoder.layers.mlp.shared_experts.linear_fc1.weight"),
        ({"norms": {"final_layernorm": "ln_f"}}, "has tensors that a Mixtral model does not: decoder.ln_f.weight"),
        ({"norms": {"linear_qkv": "linear_q_down_proj"}},
         "does not: decoder.layers.self_attention.linear_q_down_proj.weight"),
        ({"norms": {"decoder.final_layernorm.weight": "rng_state"}}, "lacks decoder.final_layernorm.weight"),
        ({"norms": {"linear_fc1.weight": "linear_fc1.weight_w"}, "prefix": "model.module."},
         "holds gate and up apart (model.module.decoder.layers.mlp.experts.experts.linear_fc1.weight_w)"),
        ({"arguments": {"swiglu": False}}, "iter_0000007: the checkpoint was made with swiglu=False"),
        ({"padded": 100}, "the vocabulary has 150 entries but the embedding 100 rows"),
    ],
)  # fmt: skip
def test_a_folder_of_another_model_is_refused(
    make_model: MakeModel, tmp_path: Path, capsys: Capture, options: dict[str, Any], sentence: str
) -> None:
    model, step = make_model(), tmp_path / "iter_0000007"
    write_model(model, step, **options)
    assert to_huggingface(step, model, tmp_path / "out") == 1
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
