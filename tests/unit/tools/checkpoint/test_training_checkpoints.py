"""Training checkpoints (torch_dist) convert to Hugging Face and to other layouts like any other."""

from pathlib import Path

import pytest
import torch
from conversion_testing import MakeModel, assert_same_tensors, disk_tensors

from megatron.core.dist_checkpointing import TensorShard, write_metadata, write_shards
from megatron.core.interchange import load_torch
from megatron.core.interchange.element_types import to_torch
from megatron.core.models.mixtral.hf_weights import mixtral_weights
from tools.checkpoint import convert_megatron_to_hf_mixtral, util
from tools.checkpoint.loader_mixtral import MegatronSource


@pytest.fixture
def trained(make_model: MakeModel, tmp_path: Path) -> tuple[Path, Path]:
    """A Hugging Face model, and a training checkpoint with its weights, saved by two tensor-parallel ranks."""
    model = make_model()
    command = f"--loader mixtral_hf --saver mixtral --load-dir {model} --save-dir {tmp_path / 'released'}"
    assert util.main(["--model-type", "GPT", *command.split()]) == 0
    source = MegatronSource(tmp_path / "released")
    folder = tmp_path / "run" / "iter_0000003"
    folder.mkdir(parents=True)
    written = []
    for rank in range(2):
        shards = []
        for rule in mixtral_weights(source.description.model):
            whole = to_torch(source.read(rule, range(rule.shape[0])), "bfloat16")
            if rule.partition_dim is None:
                part = whole.flatten() if rank == 0 else whole.flatten()[:0]
            elif rule.partition_dim == 0:
                rows = [row for rows in rule.part_rows(rank, 2) for row in rows]
                part = whole[rows].flatten()
            else:
                part = whole.chunk(2, dim=1)[rank].flatten()
            shards.append(
                TensorShard(
                    kind="weight", name=rule.name, shape=rule.shape, data=part, partition_dim=rule.partition_dim,
                    stride=rule.partition_stride, rank=rank, size=2,
                )
            )  # fmt: skip
        written.append(write_shards(folder, rank, shards))
    content = load_torch(tmp_path / "released" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    write_metadata(folder, written, iteration=3, arguments=vars(content["args"]), state={})
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    return model, tmp_path / "run"


def _to_huggingface(source: Path, config: Path, target: Path) -> int:
    return convert_megatron_to_hf_mixtral.main(
        f"--megatron-checkpoint-path {source} --huggingface-config-path {config} "
        f"--huggingface-checkpoint-path {target} --max-shard-size 50KB".split()
    )


def test_weights_arrive_bit_for_bit(trained: tuple[Path, Path], tmp_path: Path) -> None:
    model, run = trained
    assert _to_huggingface(run, model, tmp_path / "hf") == 0
    assert_same_tensors(tmp_path / "hf", disk_tensors(model))
    command = f"--loader mixtral --saver mixtral --load-dir {run} --save-dir {tmp_path / 'tp2'}"
    sizes = "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    assert util.main(["--model-type", "GPT", *command.split(), *sizes.split()]) == 0
    assert _to_huggingface(tmp_path / "tp2", model, tmp_path / "hf2") == 0
    assert_same_tensors(tmp_path / "hf2", disk_tensors(model))


def test_damage_is_named_and_leaves_nothing(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = trained
    file = run / "iter_0000003" / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert _to_huggingface(run, model, tmp_path / "hf") == 1
    error = capsys.readouterr().err
    assert "rank_00001.safetensors was altered" in error and "Traceback" not in error
    assert not (tmp_path / "hf").exists()
    # What takes no reading is found first; --dry-run finds both.
    command = f"--loader mixtral --saver mixtral --load-dir {run} --save-dir {tmp_path / 'm'} --dry-run".split()
    for flags, message in ((["--target-tensor-parallel-size", "3"], "num-attention-heads"), ([], "was altered")):
        assert util.main([*command, *flags]) == 1
        assert message in capsys.readouterr().err


def test_a_weight_of_another_model_is_refused(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = trained
    folder = run / "iter_0000003"
    (folder / "metadata.json").unlink()
    shard = TensorShard(kind="weight", name="decoder.surprise", shape=(2,), data=torch.zeros(2))
    args = load_torch(tmp_path / "released" / "release" / "mp_rank_00" / "model_optim_rng.pt")["args"]
    write_metadata(folder, [write_shards(folder, 5, [shard])], iteration=3, arguments=vars(args), state={})
    assert _to_huggingface(run, model, tmp_path / "hf") == 1
    assert "lacks decoder.final_layernorm.weight" in capsys.readouterr().err
