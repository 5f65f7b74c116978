"""NVIDIA's own package on a CPU: it loads what we write, we read and continue what it saves, at several layouts.

pip install --no-deps --target /tmp/megatron-core megatron-core==0.16.1 psutil
MEGATRON_CORE=/tmp/megatron-core python -m pytest -m peers
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_testing import checkpoint_arguments, load, tiny_trainer, train
from closeness import relative_error
from model_testing import TINY_MODEL

from megatron.core.interchange.torch_dist.names import key_of
from megatron.training.checkpoints.sharded import checkpoint_shards
from megatron.training.checkpoints.source import checkpoint_model
from megatron.training.progress import Progress
from megatron.training.setup import Trainer
from tools.checkpoint import util

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif("MEGATRON_CORE" not in os.environ, reason="MEGATRON_CORE does not name a folder"),
]

LAYOUTS = [(1, 1), (2, 1), (1, 2)]
"""Tensor- and expert-parallel sizes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=150, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    made = MixtralForCausalLM(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("peer") / "model"
    made.save_pretrained(folder)
    return folder


def run_peer(action: str, step: Path, shape: Path, result: Path, layout: tuple[int, int]) -> None:
    _torchrun("megatron_core_peer.py", [action, str(step), str(shape), str(result)], layout)


def _torchrun(script: str, arguments: list[str], layout: tuple[int, int]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", str(math.prod(layout)), str(Path(__file__).with_name(script))]
    arguments = [*arguments, *map(str, layout)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], env=environment, cwd="/", capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


def convert(flags: str, source: Path, target: Path) -> None:
    assert util.main([*flags.split(), "--load-dir", str(source), "--save-dir", str(target)]) == 0


def hugging_face_logits(folder: Path) -> torch.Tensor:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one rank", "TP2", "EP2"])
def test_it_loads_what_is_written_and_computes_the_same(model: Path, tmp_path: Path, layout: tuple[int, int]) -> None:
    written, result = tmp_path / "written", tmp_path / "logits.pt"
    flags = "--loader mixtral_hf --saver mixtral_torch_dist --target-transformer-impl local"
    convert(f"{flags} --make-vocab-size-divisible-by 8", model, written)
    run_peer("load", written / "release", model, result, layout)
    assert relative_error(torch.load(result)[..., :150], hugging_face_logits(model)) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one rank", "TP2", "EP2"])
def test_what_it_saves_is_read(model: Path, tmp_path: Path, layout: tuple[int, int]) -> None:
    step, result = tmp_path / "iter_0000007", tmp_path / "logits.pt"
    run_peer("save", step, model, result, layout)
    convert("--loader mixtral --saver mixtral_hf --true-vocab-size 150", step, tmp_path / "hf")
    run_peer("load", step, model, result, (1, 1))
    assert relative_error(torch.load(result)[..., :150], hugging_face_logits(tmp_path / "hf")) < 1e-5


def resumed(load_from: Path) -> Trainer:
    """A trainer for the peer's model, which is to load."""
    arguments = checkpoint_arguments(load=str(load_from))
    model = replace(checkpoint_model(str(load_from)), vocab_size=TINY_MODEL.vocab_size, make_vocab_size_divisible_by=8)
    return tiny_trainer(replace(arguments, model=model))


def read_by_torch(step: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its key, as PyTorch reads it."""
    metadata = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=step, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("sharding", "masters", "layout"),
    [("fully_reshardable", "param", layout) for layout in LAYOUTS] + [("none", "fp32_param", (1, 1))],
)
def test_training_here_continues_its_run(
    model: Path, tmp_path: Path, sharding: str, masters: str, layout: tuple[int, int]
) -> None:
    step = train_peer(sharding, model, tmp_path, layout)
    trainer = resumed(step)
    progress, _ = load(trainer)
    assert progress == Progress(3, 24, 24) and trainer.optimizer.scalars()["steps_taken"] == 3
    theirs, rules = read_by_torch(step), {rule.name: rule for rule in trainer.model.first.table.weights()}
    kinds = {"weight": "", "master": f"optimizer.state.{masters}.", "exp_avg": "optimizer.state.exp_avg.",
             "exp_avg_sq": "optimizer.state.exp_avg_sq."}  # fmt: skip
    for shard in checkpoint_shards(trainer.model, trainer.optimizer, trainer.groups):
        key, at = key_of(rules[shard.name], "local")
        expected = theirs[f"{kinds[shard.kind]}module.{key}"][at].reshape(-1)
        assert expected.dtype == shard.data.dtype and expected.count_nonzero(), (shard.kind, shard.name)
        length = math.prod(shard.shape)  # without padding
        assert torch.equal(shard.data[:length], expected[:length]), (shard.kind, shard.name)
    assert train(trainer, progress, 1) == _loss_of_converted(step, tmp_path)


def test_state_of_its_layout_is_left_with_a_sentence(model: Path, tmp_path: Path) -> None:
    step = train_peer("dp_reshardable", model, tmp_path, (1, 1))
    trainer = resumed(step)
    progress, remark = load(trainer)
    assert progress == Progress(3, 24, 24) and trainer.optimizer.scalars()["steps_taken"] == 0
    assert "--dist-ckpt-optim-fully-reshardable" in remark
    assert train(trainer, progress, 1) == _loss_of_converted(step, tmp_path)


def train_peer(sharding: str, model: Path, folder: Path, layout: tuple[int, int]) -> Path:
    """A step that the peer saved after three updates, of a model with the vocabulary of the tests' batches."""
    config = json.loads((model / "config.json").read_text())
    (folder / "shape").mkdir()
    (folder / "shape" / "config.json").write_text(json.dumps({**config, "vocab_size": TINY_MODEL.vocab_size}))
    step = folder / "iter_0000003"
    _torchrun("megatron_core_trainer.py", [sharding, str(step), str(folder / "shape")], layout)
    return step


def _loss_of_converted(step: Path, folder: Path) -> list[float]:
    """The loss of the fourth step, of the same weights from a folder that the conversion tools made."""
    flags = f"--true-vocab-size {TINY_MODEL.vocab_size} --make-vocab-size-divisible-by 8"
    convert(f"--loader mixtral --saver mixtral {flags}", step, folder / "torch")
    trainer = resumed(folder / "torch")
    load(trainer)
    return train(trainer, Progress(3, 24, 24), 1)
