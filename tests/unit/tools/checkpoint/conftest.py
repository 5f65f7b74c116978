"""Tiny Mixtral folders made by transformers, in the forms that are found on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_testing import TOKENIZER, MakeModel
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function that gives a folder with a random model; every weight is random, norms included."""
    from transformers import MixtralConfig, MixtralForCausalLM

    made: dict[tuple[int, torch.dtype, int, str, int], Path] = {}

    def make(
        experts: int = 4, dtype: torch.dtype = torch.bfloat16, seed: int = 0, form: str = "single", vocab: int = 150
    ) -> Path:
        key = (experts, dtype, seed, form, vocab)
        if key in made:
            return made[key]
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=24, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, num_local_experts=experts, max_position_embeddings=64,
        )  # fmt: skip
        model: Any = MixtralForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model = model.to(dtype)
        folder = made[key] = tmp_path_factory.mktemp(f"model-{form}")
        model.save_pretrained(folder, max_shard_size="60KB" if form == "sharded" else "1GB")
        if form == "fused":
            state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            assert any("gate_up_proj" in name for name in state)
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        elif form == "bin":
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            names = sorted(tensors)
            files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
            for file, part in files.items():
                torch.save({name: tensors[name] for name in part}, folder / file)
            index = {"weight_map": {name: file for file, part in files.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for name, content in TOKENIZER.items():
            (folder / name).write_bytes(content)
        return folder

    return make


@pytest.fixture
def copy_model(make_model: MakeModel, tmp_path: Path) -> MakeModel:
    """The same, as a copy that a test may change."""

    def copy(name: str = "hf", **options: object) -> Path:
        return Path(shutil.copytree(make_model(**options), tmp_path / name))

    return copy
