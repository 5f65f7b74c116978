"""N + N steps with a restart in between equal 2N steps, bit for bit, through the real program."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed_testing import run_program

from megatron.core.dist_checkpointing import CheckpointReader
from megatron.core.interchange import load_torch

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (
    "--tokenizer-type NullTokenizer --vocab-size 203 --mock-data --num-layers 2 --hidden-size 32 "
    "--ffn-hidden-size 48 --num-attention-heads 4 --num-query-groups 2 --num-experts 4 --seq-length 16 "
    "--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 6 --lr 1e-2 "
    "--lr-decay-style cosine --lr-warmup-iters 2 --eval-interval 0 --log-interval 1 --moe-aux-loss-coeff 1e-2 "
    "--num-workers 0 --device cpu"
).split()


def pretrain(
    processes: int, *flags: str, script: Sequence[str] = (str(REPOSITORY / "pretrain_gpt.py"),), restarts: int = 0
) -> subprocess.CompletedProcess:
    """Runs pretrain_gpt.py, or a script with its own arguments, under torchrun."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", str(processes)),
        *("--max-restarts", str(restarts), *script),
        *FLAGS,
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def assert_equal(a: object, b: object, where: str) -> None:
    """Both hold the same values, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    else:
        assert a == b, where


def assert_same_step(ours: Path, theirs: Path) -> None:
    """Two steps of either format hold the same values, bit for bit."""
    if (theirs / "sharded.json").exists():
        with CheckpointReader(ours) as a, CheckpointReader(theirs) as b:
            assert_equal(a.state, b.state, "state")
            assert a.metadata.tensors.keys() == b.metadata.tensors.keys()
            for kind, name in b.metadata.tensors:
                assert_equal(a.read(name, kind), b.read(name, kind), f"{kind} of {name}")
        return
    files = sorted(theirs.glob("*/model_optim_rng.pt"))
    assert files
    for file in files:
        one, other = load_torch(ours / file.relative_to(theirs)), load_torch(file)
        assert one.keys() == other.keys()
        for key in other.keys() - {"args"}:
            assert_equal(one[key], other[key], key)


TP2_BF16 = "--tensor-model-parallel-size 2 --sequence-parallel --bf16"
PP2 = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PP2} --num-layers 4 --num-layers-per-virtual-pipeline-stage 1"
EP2 = "--expert-model-parallel-size 2"
ZERO = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --bf16"
CASES = {
    "tp2_bf16": f"{TP2_BF16} --ckpt-format sharded",
    "pp2_v2_rank_files": f"{INTERLEAVED} --ckpt-format torch",
    "pp2_v2": f"{INTERLEAVED} --ckpt-format sharded",
    "ep2_rank_files": f"{EP2} --ckpt-format torch",
    "ep2_global_aux_loss_jitter": f"{EP2} --moe-router-load-balancing-type global_aux_loss --moe-input-jitter-eps 0.1",
    "ep2_async": f"{EP2} --ckpt-format sharded --async-save --save-interval 1",
    "zero2_async": f"{ZERO} --ckpt-format sharded --async-save --save-interval 2",
}


def _numbers(metrics: Path) -> list[str]:
    """The lines of a metrics file up to what was measured with a clock."""
    return [line.partition(', "tokens_per_second"')[0] for line in metrics.read_text().splitlines()]


def test_a_run_goes_on_from_its_middle(tmp_path: Path) -> None:
    """One half of a restart, in two jobs instead of three: a run that went on is continued from its third step."""
    flags = CASES["pp2_v2_rank_files"].split()
    whole, second = tmp_path / "whole", tmp_path / "second"
    for more in (["--save-interval", "3", "--save", whole], ["--load", whole / "iter_0000003", "--save", second]):
        output = run_program(2, tmp_path, *FLAGS, *flags, *map(str, more), "--metrics-path", f"{more[-1]}.jsonl")
    assert "resumed at iteration 3" in output
    lines = _numbers(tmp_path / "whole.jsonl")
    assert len(lines) == 6 and _numbers(tmp_path / "second.jsonl") == lines[3:]
    assert_same_step(second / "iter_0000006", whole / "iter_0000006")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_restart_changes_nothing(tmp_path: Path, case: str) -> None:
    whole = ["--save", str(tmp_path / "whole"), "--metrics-path", str(tmp_path / "whole.jsonl")]
    halves = ["--save", str(tmp_path / "halves"), "--load", str(tmp_path / "halves")]
    halves += ["--metrics-path", str(tmp_path / "halves.jsonl")]
    for flags in (whole, [*halves, "--exit-interval", "3"], halves):
        result = pretrain(2, *CASES[case].split(), *flags)
        assert result.returncode == 0, result.stderr
    assert "resumed at iteration 3" in result.stdout
    lines = _numbers(tmp_path / "whole.jsonl")
    assert len(lines) == 6 and _numbers(tmp_path / "halves.jsonl") == lines
    assert_same_step(tmp_path / "halves" / "iter_0000006", tmp_path / "whole" / "iter_0000006")


DYING = """
import os, signal, sys
from pathlib import Path
import pretrain_gpt
from megatron.training import training

step, marker = training.train_step, Path(sys.argv.pop(1))

def train_step(trainer, source, progress, *rest):
    if progress.iteration == 4 and trainer.groups.world.rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, source, progress, *rest)

training.train_step = train_step
training.pretrain(pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tp2_bf16", "zero2_async"])
def test_a_killed_rank_is_started_again_and_changes_nothing(tmp_path: Path, case: str) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    flags = [*CASES[case].split(), "--save-interval", "2"]
    result = pretrain(2, *flags, "--save", str(tmp_path / "whole"))
    assert result.returncode == 0, result.stderr
    own = ["--save", str(tmp_path / "killed"), "--load", str(tmp_path / "killed")]
    result = pretrain(2, *flags, *own, script=[str(script), str(tmp_path / "marker")], restarts=1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "marker").exists() and "resumed at iteration" in result.stdout
    assert_same_step(tmp_path / "killed" / "iter_0000006", tmp_path / "whole" / "iter_0000006")
