"""The examples: the commands that they would run are ones that the programs take."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from model_testing import TINY_MODEL
from test_documentation import flags
from test_example_script import SCRIPT, machine, words_of  # noqa: F401, a fixture

from megatron.training.arguments import parse_arguments

EXAMPLES = SCRIPT.parent / "examples"
GIVEN = {"DATA": "text", "WORK": "work", "OUT": "out", "MASTER_ADDR": "host0", "VOCAB_SIZE": "32000"}
LAYOUTS = {
    "continue_from_hugging_face.sh": (4, 2, 4, 8),
    "laptop.sh": (2, 1, 4, 2),
    "mixtral_8x7b_16_gpus.sh": (4, 4, 8, 16),
    "mixtral_8x7b_8_gpus.sh": (1, 1, 8, 8),
    "one_gpu.sh": (1, 1, 8, 1),
    "slurm.sbatch": (4, 4, 8, 16),
    "upcycle.sh": (4, 2, 4, 8),
}
"""TP, PP, experts and processes of each."""


def test_every_example_is_tried() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == set(LAYOUTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_trainer_takes_the_flags(name: str, machine: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    environment = machine | GIVEN | {"HF": machine["TOKENIZER_MODEL"]}
    if name == "slurm.sbatch":
        programs = tmp_path / "programs"
        for program, body in {"scontrol": "echo host0; echo host1", "srun": 'shift; exec "$@"'}.items():
            (programs / program).write_text(f"#!/bin/sh\n{body}\n")
            (programs / program).chmod(0o755)
        environment |= {"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_NNODES": "2"}
        environment |= {"SLURM_NODEID": "1"}
    ran = subprocess.run(
        [shutil.which("bash") or "bash", str(EXAMPLES / name), "--seed", "7"],
        env=environment, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    commands = [words_of(line) for line in ran.stdout.splitlines() if ".py" in line]
    training = next(words for words in commands if str(SCRIPT.parent / "pretrain_gpt.py") in words)
    begin = training.index(str(SCRIPT.parent / "pretrain_gpt.py")) + 1
    arguments, _ = parse_arguments(training[begin:])
    tp, pp, experts, processes = LAYOUTS[name]
    parallel = arguments.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (tp, pp)
    assert arguments.model.num_experts == experts and arguments.training.seed == 7
    nodes, local = (int(training[training.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node"))
    assert nodes * local == processes
    if name == "slurm.sbatch":
        assert training[training.index("--node-rank") + 1] == "1"
    known = {flag for path in SCRIPT.parent.glob("tools/**/*.py") for flag in flags(path.read_text(encoding="utf-8"))}
    assert {word for words in commands if words is not training for word in words if word.startswith("--")} <= known


@pytest.mark.slow
def test_continued_pretraining_from_folder_to_folder(tmp_path: Path) -> None:
    """Stopped after two steps and started again; the second start repeats nothing."""
    from tools.demo.model import make_model, train_tokenizer

    texts = [f"{word} {word * 2} and {word * 3} on line {number}" for number in range(300) for word in ("one", "two")]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    hf = tmp_path / "a model"
    size = train_tokenizer(texts, 280, hf)
    shape = replace(TINY_MODEL, vocab_size=size, params_dtype="float32")
    make_model(shape, hf)
    sizes = {
        "NUM_LAYERS": shape.num_layers, "HIDDEN_SIZE": shape.hidden_size, "FFN_HIDDEN_SIZE": shape.ffn_hidden_size,
        "NUM_ATTENTION_HEADS": shape.num_attention_heads, "NUM_QUERY_GROUPS": shape.query_groups,
        "NUM_EXPERTS": shape.num_experts, "MOE_ROUTER_TOPK": shape.moe_router_topk, "ROTARY_BASE": shape.rotary_base,
        "SEQ_LENGTH": 16, "MAX_POSITION_EMBEDDINGS": shape.max_position_embeddings, "GLOBAL_BATCH_SIZE": 2,
        "TRAIN_ITERS": 4, "LR_WARMUP_ITERS": 1, "TP": 2, "PP": 1, "WORKERS": 1,
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in sizes.items()}
    environment |= {"HF": str(hf), "DATA": str(tmp_path / "text"), "WORK": str(tmp_path / "work")}
    environment |= {"OUT": str(tmp_path / "out"), "DEVICE": "cpu", "PRECISION": "fp32", "SPLIT": "100,0,0"}
    first, second = (
        subprocess.run(
            ["bash", str(EXAMPLES / "continue_from_hugging_face.sh"), "--norm-epsilon", str(shape.norm_epsilon), *more],
            env=environment, capture_output=True, text=True,
        )
        for more in (["--exit-interval", "2"], [])
    )  # fmt: skip
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "util.py" in first.stdout and "util.py" not in second.stdout and "iteration        4" in second.stdout
    assert (tmp_path / "out" / "config.json").exists()
