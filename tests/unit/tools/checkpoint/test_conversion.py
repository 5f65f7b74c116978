"""Hugging Face -> Megatron -> Hugging Face through the two command lines, and the files in between."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_testing import TOKENIZER, MakeModel, assert_same_tensors, disk_tensors

from megatron.core.interchange import load_torch, save_torch
from tools.checkpoint import convert_megatron_to_hf_mixtral, util

LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)]
MATRIX = list(itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4)))
SOME_OF_MATRIX = [(1, 2, 4), (2, 2, 2)]


def to_megatron(source: Path, target: Path, tp: int, pp: int, *more: str, loader: str = "mixtral_hf") -> int:
    command = ["--model-type", "GPT", "--loader", loader, "--saver", "mixtral", "--load-dir", str(source)]
    command += ["--save-dir", str(target), "--target-tensor-parallel-size", str(tp)]
    return util.main([*command, "--target-pipeline-parallel-size", str(pp), *more])


def to_huggingface(source: Path, config: Path, target: Path, tp: int, pp: int, *more: str) -> int:
    command = ["--megatron-checkpoint-path", str(source), "--huggingface-config-path", str(config)]
    command += ["--huggingface-checkpoint-path", str(target), "--tensor-parallel-size", str(tp)]
    return convert_megatron_to_hf_mixtral.main([*command, "--pipeline-parallel-size", str(pp), *more])


@pytest.mark.parametrize(
    ("form", "layout"),
    [("single", layout) for layout in LAYOUTS]
    + [(form, layout) for form in ("sharded", "fused", "bin") for layout in ((1, 1), (4, 2))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("experts", [4, 8])
def test_round_trip_is_exact(
    make_model: MakeModel, tmp_path: Path, experts: int, dtype: torch.dtype, form: str, layout: tuple[int, int]
) -> None:
    source = make_model(experts=experts, dtype=dtype, form=form)
    expected = disk_tensors(make_model(experts=experts, dtype=dtype))
    assert to_megatron(source, tmp_path / "megatron", *layout) == 0
    assert to_huggingface(tmp_path / "megatron", source, tmp_path / "hf", *layout, "--max-shard-size", "50KB") == 0
    assert_same_tensors(tmp_path / "hf", expected)
    for name, content in TOKENIZER.items():
        assert (tmp_path / "hf" / name).read_bytes() == content
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_transformers_loads_the_output(make_model: MakeModel, tmp_path: Path, shard_size: str) -> None:
    from transformers import MixtralForCausalLM

    source = make_model()
    assert to_megatron(source, tmp_path / "megatron", 2, 2) == 0
    assert to_huggingface(tmp_path / "megatron", source, tmp_path / "hf", 2, 2, "--max-shard-size", shard_size) == 0
    files = {path.name for path in (tmp_path / "hf").glob("model*")}
    assert files == {"model.safetensors"} if shard_size == "1GB" else len(files) > 2
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert file.stat().st_size < 60_000 or shard_size == "1GB"
    loaded: Any = MixtralForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    original = MixtralForCausalLM.from_pretrained(source)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)


@pytest.mark.parametrize(
    "layout", [*[pytest.param(layout, marks=pytest.mark.slow) for layout in MATRIX], *SOME_OF_MATRIX], ids=str
)
@pytest.mark.parametrize("vocab", [150, 512], ids=["padded", "divides"])
def test_round_trip_is_exact_at_every_layout(
    make_model: MakeModel, tmp_path: Path, layout: tuple[int, int, int], vocab: int, request: pytest.FixtureRequest
) -> None:
    """TP x PP x EP, with 4 and 8 experts, in three types; on the way the checkpoint is resharded once."""
    thorough = any(mark.name == "slow" for mark in request.node.iter_markers())
    for experts, dtype in itertools.product((4, 8), (torch.bfloat16, torch.float32, torch.float16)):
        if not thorough and (experts, dtype) != ((4, torch.bfloat16) if vocab == 150 else (8, torch.float32)):
            continue
        source = make_model(experts=experts, dtype=dtype, vocab=vocab)
        name = f"{experts}-{dtype}"
        tp, pp, ep = layout
        assert to_megatron(source, tmp_path / f"m-{name}", tp, pp, "--target-expert-parallel-size", str(ep)) == 0
        other = ("--target-expert-parallel-size", str(4 // ep))
        assert (
            to_megatron(tmp_path / f"m-{name}", tmp_path / f"o-{name}", 4 // tp, 4 // pp, *other, loader="mixtral") == 0
        )
        for there, sizes, expert in (("m", (tp, pp), ep), ("o", (4 // tp, 4 // pp), 4 // ep)):
            flags = (*sizes, "--expert-parallel-size", str(expert), "--max-shard-size", "50KB")
            assert to_huggingface(tmp_path / f"{there}-{name}", source, tmp_path / f"hf-{there}-{name}", *flags) == 0
            assert_same_tensors(tmp_path / f"hf-{there}-{name}", disk_tensors(source))


@pytest.mark.parametrize("etp", [1, 2])
def test_experts_cut_into_other_parts_than_the_rest(make_model: MakeModel, tmp_path: Path, etp: int) -> None:
    source = make_model()
    sizes = ("--target-expert-parallel-size", "2", "--target-expert-tensor-parallel-size", str(etp))
    assert to_megatron(source, tmp_path / "m", 4, 2, *sizes) == 0
    names = {path.name for path in (tmp_path / "m" / "release").iterdir()}
    pairs = {(0, 0), (1, 1), (2, 0), (3, 1)} if etp == 1 else {(0, 0), (1, 0), (2, 1), (3, 1)}
    assert names == {f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}" for tp, ep in pairs for pp in (0, 1)}
    assert to_megatron(tmp_path / "m", tmp_path / "n", 1, 1, loader="mixtral") == 0
    assert to_huggingface(tmp_path / "m", source, tmp_path / "hf", 4, 2) == 0
    assert to_huggingface(tmp_path / "n", source, tmp_path / "hf2", 1, 1) == 0
    for folder in ("hf", "hf2"):
        assert_same_tensors(tmp_path / folder, disk_tensors(source))


@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ("--target-pipeline-layers 1,3", [[1], [3]]),
        ("--target-pipeline-layers 1,1,2", [[1], [1], [2]]),
        ("--target-pipeline-parallel-size 2 --target-decoder-last-pipeline-num-layers 1", [[3], [1]]),
        ("--target-pipeline-parallel-size 2 --target-num-virtual-stages-per-pipeline-rank 2", [[1, 1], [1, 1]]),
    ],
)
def test_uneven_and_virtual_stages(make_model: MakeModel, tmp_path: Path, flags: str, counts: list[list[int]]) -> None:
    source, target = make_model(), tmp_path / "m"
    command = f"--loader mixtral_hf --saver mixtral --load-dir '{source}' --save-dir '{target}' {flags}"
    assert util.main(shlex.split(command)) == 0
    for rank, chunks in enumerate(counts):
        content = load_torch(target / "release" / f"mp_rank_00_{rank:03d}" / "model_optim_rng.pt")
        keys = ["model"] if len(chunks) == 1 else ["model0", "model1"]
        assert [key for key in content if key.startswith("model")] == keys
        for key, layers in zip(keys, chunks, strict=True):
            assert len([name for name in content[key] if name.endswith("input_layernorm.weight")]) == layers
    assert to_huggingface(target, source, tmp_path / "hf", 1, len(counts)) == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(source))


def _transformer_engine(weights: dict[str, Any]) -> dict[str, Any]:
    """NVIDIA's spelling with fused norms and grouped experts, and its extra keys."""
    spelled = {"decoder.layers.0.mlp.experts.linear_fc1._extra_state": None}
    for name, tensor in weights.items():
        name = re.sub(r"local_experts\.(\d+)\.(linear_fc[12])\.weight", r"\2.weight\1", name)
        spelled[name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")] = tensor
    return spelled


def _stacked(weights: dict[str, Any]) -> dict[str, Any]:
    """NVIDIA's older grouped experts: all of a rank in two tensors, each matrix transposed."""
    stacked: dict[str, Any] = {name: tensor for name, tensor in weights.items() if "local_experts" not in name}
    for layer in {name.split(".experts.")[0] for name in weights if "local_experts" in name}:
        for number in (1, 2):
            matrices = [
                weights[name].T.contiguous()
                for name in sorted(weights, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
                if name.startswith(f"{layer}.experts") and name.endswith(f"linear_fc{number}.weight")
            ]
            hidden = matrices[0].shape[0 if number == 1 else 1]
            shape = (hidden, -1) if number == 1 else (-1, hidden)
            stacked[f"{layer}.experts.weight{number}"] = torch.stack(matrices).view(shape)
    return stacked


@pytest.mark.parametrize("spelling", [_transformer_engine, _stacked], ids=["grouped", "stacked"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_nvidias_other_spellings(make_model: MakeModel, tmp_path: Path, spelling: Any, layout: tuple[int, ...]) -> None:
    source = make_model()
    assert to_megatron(source, tmp_path / "m", *layout[:2], "--target-expert-parallel-size", str(layout[2])) == 0
    for path in (tmp_path / "m").rglob("*.pt"):
        content = load_torch(path)
        content["model"] = spelling(content["model"])
        torch.save(content, path)
    assert to_huggingface(tmp_path / "m", source, tmp_path / "hf", *layout[:2]) == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(source))


@pytest.mark.parametrize(
    ("ep", "etp"), [(1, 2), (2, 2), (2, 1)], ids=["experts on every rank", "EP=2", "EP=2 and whole experts"]
)
def test_rank_files_are_the_documented_ones(make_model: MakeModel, tmp_path: Path, ep: int, etp: int) -> None:
    """TP=2, PP=2, cut by hand from the Hugging Face tensors following reference documents, not our table."""
    source = make_model(dtype=torch.float32)
    flags = ["--target-expert-parallel-size", str(ep), "--target-expert-tensor-parallel-size", str(etp)]
    flags += ["--tokenizer-model", str(source / "tokenizer.model")]
    assert to_megatron(source, tmp_path / "m", 2, 2, *flags) == 0
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release"
    files = {path.parent.name for path in (tmp_path / "m").rglob("*.pt")}
    pairs = [(t, e) for t in (0, 1) for e in range(ep) if etp == 2 or t == e]
    folder = "mp_rank_{:02d}_{:03d}_{:03d}" if ep > 1 else "mp_rank_{:02d}_{:03d}"
    assert files == {folder.format(t, p, e) for t, e in pairs for p in (0, 1)}
    hf = disk_tensors(source)
    head, heads_per_group = 4, 2
    for tp, expert_rank in pairs:
        for pp in (0, 1):
            name = folder.format(tp, pp, expert_rank)
            content = load_torch(tmp_path / "m" / "release" / name / "model_optim_rng.pt")
            assert (content["checkpoint_version"], content["iteration"]) == (3.0, 0)
            args = content["args"]
            assert (args.num_layers, args.num_experts, args.ffn_hidden_size) == (4, 4, 24)
            assert (args.vocab_size, args.padded_vocab_size, args.rotary_base) == (150, 256, 1e6)
            assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
            assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (ep, etp)
            assert args.tokenizer_type == "PretrainedTokenizerFromHF" and args.tokenizer_model == str(source)
            expected = {}
            vocabulary = {"embedding.word_embeddings": "model.embed_tokens"} if pp == 0 else {"output_layer": "lm_head"}
            for here, there in vocabulary.items():
                padded = torch.zeros(256, 32)
                padded[:150] = hf[f"{there}.weight"]
                expected[f"{here}.weight"] = padded[128 * tp : 128 * (tp + 1)]
            if pp == 1:
                expected["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
            for layer in (0, 1):
                old, new = f"model.layers.{layer + 2 * pp}", f"decoder.layers.{layer}"
                query, key, value = (hf[f"{old}.self_attn.{x}_proj.weight"] for x in "qkv")
                rows = []
                for group in (2 * tp, 2 * tp + 1):
                    for h in range(heads_per_group * group, heads_per_group * (group + 1)):
                        rows.append(query[h * head : (h + 1) * head])
                    rows.append(key[group * head : (group + 1) * head])
                    rows.append(value[group * head : (group + 1) * head])
                expected[f"{new}.self_attention.linear_qkv.weight"] = torch.cat(rows)
                output = hf[f"{old}.self_attn.o_proj.weight"]
                expected[f"{new}.self_attention.linear_proj.weight"] = output[:, 16 * tp : 16 * (tp + 1)]
                expected[f"{new}.input_layernorm.weight"] = hf[f"{old}.input_layernorm.weight"]
                expected[f"{new}.pre_mlp_layernorm.weight"] = hf[f"{old}.post_attention_layernorm.weight"]
                expected[f"{new}.mlp.router.weight"] = hf[f"{old}.block_sparse_moe.gate.weight"]
                for e in range(4 // ep):
                    expert = e + expert_rank * (4 // ep)
                    w1, w2, w3 = (hf[f"{old}.block_sparse_moe.experts.{expert}.w{n}.weight"] for n in (1, 2, 3))
                    name = f"{new}.mlp.experts.local_experts.{e}"
                    part = slice(12 * tp, 12 * (tp + 1)) if etp == 2 else slice(None)
                    expected[f"{name}.linear_fc1.weight"] = torch.cat([w1[part], w3[part]])
                    expected[f"{name}.linear_fc2.weight"] = w2[:, part]
            assert set(content["model"]) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(content["model"][name], tensor), (tp, pp, name)


def test_files_hold_no_more_than_their_tensors(make_model: MakeModel, tmp_path: Path) -> None:
    """A slice that drags its whole storage along would double the files."""
    assert to_megatron(make_model(), tmp_path / "one", 1, 1) == 0
    assert to_megatron(tmp_path / "one", tmp_path / "m", 4, 1, loader="mixtral") == 0
    for path in (tmp_path / "m").rglob("*.pt"):
        tensors = load_torch(path)["model"].values()
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(("first", "second"), [((4, 2), (1, 1)), ((1, 2), (2, 4)), ((2, 1), (2, 2))])
def test_resharding_equals_converting_directly(
    make_model: MakeModel, tmp_path: Path, first: tuple[int, int], second: tuple[int, int]
) -> None:
    source = make_model()
    assert to_megatron(source, tmp_path / "a", *first) == 0
    assert to_megatron(tmp_path / "a", tmp_path / "b", *second, loader="mixtral") == 0
    assert to_megatron(source, tmp_path / "direct", *second) == 0
    paths = sorted(path.relative_to(tmp_path / "direct") for path in (tmp_path / "direct").rglob("*.pt"))
    assert paths == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*.pt"))
    for path in paths:
        direct, resharded = load_torch(tmp_path / "direct" / path), load_torch(tmp_path / "b" / path)
        assert vars(direct["args"]) == vars(resharded["args"])
        assert list(direct["model"]) == list(resharded["model"])
        assert all(torch.equal(direct["model"][name], resharded["model"][name]) for name in direct["model"])


def test_vocabulary_padding_is_zero_and_cut(make_model: MakeModel, tmp_path: Path) -> None:
    """150 entries at TP=4 padded to multiples of 100 x 4: the last two ranks hold nothing but padding."""
    source = make_model()
    assert to_megatron(source, tmp_path / "m", 4, 1, "--make-vocab-size-divisible-by", "100") == 0
    embedding = [
        load_torch(tmp_path / "m" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")["model"][
            "embedding.word_embeddings.weight"
        ]
        for rank in range(4)
    ]
    assert [tuple(part.shape) for part in embedding] == [(100, 32)] * 4
    assert torch.equal(torch.cat(embedding)[:150], disk_tensors(source)["model.embed_tokens.weight"])
    assert not torch.cat(embedding)[150:].any()
    assert to_huggingface(tmp_path / "m", source, tmp_path / "hf", 4, 1) == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(source))


def test_trained_checkpoints_convert(make_model: MakeModel, tmp_path: Path) -> None:
    """A step's folder whose files hold an optimizer, random state and TransformerEngine's extra keys."""
    source = make_model()
    root = tmp_path / "m"
    assert to_megatron(source, root, 2, 2) == 0
    for path in (root / "release").rglob("*.pt"):
        content = load_torch(path)
        content["iteration"] = 100
        content["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        content["model"]["decoder.layers.0.self_attention.core_attention._extra_state"] = None
        del content["args"].vocab_size
        save_torch(path, content)
    shutil.copytree(root / "release", root / "iter_0000100")
    (root / "latest_checkpointed_iteration.txt").write_text("100")
    for number, path in enumerate((root, root / "iter_0000100", root / "release")):
        assert to_huggingface(path, source, tmp_path / f"hf{number}", 2, 2) == 0
        assert_same_tensors(tmp_path / f"hf{number}", disk_tensors(source))
    assert to_huggingface(root, source, tmp_path / "hf", 2, 2, "--iteration", "release") == 0


def test_padded_vocabulary_without_a_true_size(
    make_model: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of other programs: the padded size is taken with a warning, or the user says what is real."""
    root = tmp_path / "m"
    assert to_megatron(make_model(), root, 1, 1) == 0
    content = load_torch(root / "release" / "mp_rank_00" / "model_optim_rng.pt")
    del content["args"].vocab_size
    save_torch(root / "release" / "mp_rank_00" / "model_optim_rng.pt", content)
    assert to_megatron(root, tmp_path / "a", 1, 1, loader="mixtral") == 0
    assert "--true-vocab-size" in capsys.readouterr().err
    assert load_torch(tmp_path / "a" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"].vocab_size == 256
    assert to_megatron(root, tmp_path / "b", 1, 1, "--true-vocab-size", "150", loader="mixtral") == 0
    assert load_torch(tmp_path / "b" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"].vocab_size == 150
    assert to_megatron(root, tmp_path / "c", 1, 1, "--true-vocab-size", "257", loader="mixtral") == 1


def test_type_of_weights_can_be_changed(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model()
    assert to_megatron(source, tmp_path / "m", 2, 1, "--params-dtype", "float32") == 0
    args = load_torch(tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"]
    assert args.params_dtype == "float32" and not args.bf16
    assert to_huggingface(tmp_path / "m", source, tmp_path / "hf", 2, 1) == 0
    assert_same_tensors(tmp_path / "hf", {name: tensor.float() for name, tensor in disk_tensors(source).items()})
    original, written = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "hf"))
    assert written == {**original, "dtype": "float32"}


def test_float16_stays_float16(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(dtype=torch.float16)
    assert to_megatron(source, tmp_path / "m", 2, 1) == 0
    assert to_huggingface(tmp_path / "m", source, tmp_path / "hf", 2, 1) == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(source))
