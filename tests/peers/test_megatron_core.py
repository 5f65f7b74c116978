"""NVIDIA's own package on a CPU: it loads what we write, and we read what it saves, at several layouts.

pip install --no-deps --target /tmp/megatron-core megatron-core==0.16.1 psutil
MEGATRON_CORE=/tmp/megatron-core python -m pytest -m peers
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from closeness import relative_error

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
    tp, ep = layout
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, "--nproc-per-node", str(tp * ep), str(Path(__file__).with_name("megatron_core_peer.py"))]
    arguments = [action, str(step), str(shape), str(result), str(tp), str(ep)]
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
