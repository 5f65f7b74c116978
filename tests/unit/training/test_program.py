"""The whole program in one process: which data it reads, where it stops, what it says of mistakes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pretrain_gpt
from megatron.core.datasets.indexed_dataset_writer import IndexedDatasetWriter
from megatron.training import training
from megatron.training.environment import Environment

REPOSITORY = Path(__file__).resolve().parents[3]
SHAPE = (
    "--num-layers 1 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --num-experts 2 --seq-length 8 "
    "--max-position-embeddings 8 --micro-batch-size 1 --num-workers 0 --device cpu --tokenizer-type NullTokenizer "
    "--vocab-size 64 --log-interval 1 --eval-iters 1"
).split()


def pretrain(monkeypatch: pytest.MonkeyPatch, *flags: str, world_size: int = 1) -> None:
    """Runs the program in this process."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *SHAPE, *flags])
    environment = Environment(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size)
    providers = (pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
    training._pretrain(environment, *providers)


def metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def three_splits(tmp_path: Path) -> str:
    """Documents whose split shows in the loss: training is all 1s, validation all 2s, test all 3s."""
    with IndexedDatasetWriter(tmp_path / "data_text_document", np.uint16) as writer:
        for token, documents in ((1, 60), (2, 20), (3, 20)):
            for _ in range(documents):
                writer.add_document([token] * 32)
        writer.finalize()
    return str(tmp_path / "data_text_document")


def test_each_split_is_read_for_its_purpose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, three_splits: str) -> None:
    log = tmp_path / "metrics.jsonl"
    flags = f"--data-path '{three_splits}' --split 60,20,20 --global-batch-size 4 --train-iters 30 --lr 0.05"
    pretrain(monkeypatch, *shlex.split(flags), "--eval-interval", "30", "--metrics-path", str(log))
    lines = metrics(log)
    steps = [line["lm_loss"] for line in lines if "lm_loss" in line]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    test = [line["test_loss"] for line in lines if "test_loss" in line]
    assert len(steps) == 30 and steps[-1] < 0.1
    assert len(validation) == len(test) == 1
    # tokens that were never seen in training stay improbable, each to its own degree
    assert validation[0] > 3 and test[0] > 3 and validation[0] != test[0]


def test_the_log_counts_operations_of_active_parameters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--mock-data --global-batch-size 4 --train-iters 3 --lr 0.01 --eval-interval 0 --num-experts 4"
    pretrain(monkeypatch, *flags.split(), "--log-throughput", "--peak-tflops", "1e-5")
    layer = 4 * 16 * 16 + 2 * 3 * 16 * 16 + 4 * 16  # q, k, v and o; two experts of four; the router
    attention = 2 * 16 * 4.5  # each position sees (8 + 1) / 2 in the mean
    flops = 4 * 8 * 6 * (layer + attention + 64 * 16)  # of a step: samples, tokens, the weights and the vocabulary
    lines = re.findall(r"iteration \(ms\): ([\d.]+) .* MFU: ([\d.]+)%", capsys.readouterr().out)
    assert len(lines) == 3
    for milliseconds, mfu in lines:
        assert float(mfu) == pytest.approx(100 * flops / (float(milliseconds) / 1e3) / 1e7, rel=0.05)


def test_each_split_may_have_files_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for token, name in enumerate(("a", "b", "valid", "test")):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document([token + 1] * 256)
            writer.finalize()
    a, b, valid, test = (str(tmp_path / name) for name in ("a", "b", "valid", "test"))
    log = tmp_path / "metrics.jsonl"
    flags = (
        f"--train-data-path 3 '{a}' 1 '{b}' --valid-data-path '{valid}' --test-data-path '{test}' --global-batch-size 4"
    )
    pretrain(monkeypatch, *shlex.split(flags), "--train-iters", "32", "--lr", "0.05", "--metrics-path", str(log))
    lines = metrics(log)
    steps = [line["lm_loss"] for line in lines if "lm_loss" in line]
    validation, test_loss = lines[-2]["validation_loss"], lines[-1]["test_loss"]
    assert steps[-1] < 1 and validation > 3 and test_loss > 3 and validation != test_loss
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"{a} 75.00% 256 3.00" in rows and f"{b} 25.00% 256 1.00" in rows
    assert f"{valid} 100.00% 256 0.12" in rows and f"{test} 100.00% 256 0.12" in rows


def test_a_resumed_run_refuses_replaced_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, three_splits: str
) -> None:
    run = str(tmp_path / "run")
    flags = ["--data-path", three_splits, "--save", run, "--load", run, "--eval-interval", "0", "--lr-decay-iters", "9"]
    flags.append("--train-iters")
    pretrain(monkeypatch, *flags, "2")
    pretrain(monkeypatch, *flags, "3")
    tokens = Path(three_splits + ".bin")
    before = {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()}
    original = tokens.read_bytes()
    tokens.write_bytes(original[:1000] + b"\5\0" + original[1002:])
    with pytest.raises(ValueError, match=f"{three_splits} holds other data than when the checkpoint was saved"):
        pretrain(monkeypatch, *flags, "4")
    assert {path: path.read_bytes() for path in Path(run).rglob("*") if path.is_file()} == before
    pretrain(monkeypatch, *flags[:2], *"--train-iters 1 --eval-interval 0 --finetune --load".split(), run)
    tokens.write_bytes(original)
    pretrain(monkeypatch, *flags, "4")


def test_another_batch_size_after_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    flags = ["--mock-data", "--eval-interval", "0", "--save", str(tmp_path / "run"), "--load", str(tmp_path / "run")]
    flags += ["--metrics-path", str(log)]
    pretrain(monkeypatch, *flags, "--train-samples", "40", "--global-batch-size", "2", "--exit-interval", "10")
    pretrain(monkeypatch, *flags, "--train-samples", "40", "--global-batch-size", "4")
    assert metrics(log)[-1] | {"iteration": 15, "consumed_samples": 40} == metrics(log)[-1]
    longer = [*flags, "--train-iters", "17", "--global-batch-size", "8"]
    with pytest.raises(ValueError, match=r"decay_samples was 40, is 136\. Add --override-opt_param-scheduler"):
        pretrain(monkeypatch, *longer)
    pretrain(monkeypatch, *longer, "--override-opt_param-scheduler")
    assert metrics(log)[-1] | {"iteration": 17, "consumed_samples": 56} == metrics(log)[-1]


def test_a_new_run_does_not_erase_another_runs_metrics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    for iterations in ("2", "1"):
        flags = ["--mock-data", "--eval-interval", "0", "--train-iters", iterations, "--metrics-path", str(log)]
        pretrain(monkeypatch, *flags)
    assert len(metrics(log)) == 1 and len(metrics(tmp_path / "metrics.jsonl.1")) == 2


def test_without_training_the_loaded_weights_are_evaluated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, three_splits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "metrics.jsonl"
    flags = ["--data-path", three_splits, *"--split 60,20,20 --global-batch-size 4 --train-iters 5 --lr 0.05".split()]
    flags += ["--save", str(run), "--load", str(run), "--metrics-path", str(log), "--eval-interval"]
    pretrain(monkeypatch, *flags, "5")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    trained = log.read_text().splitlines()
    with log.open("a") as file:  # a run that goes on meanwhile is further than its newest checkpoint
        file.write(later := '{"iteration": 9}\n')
    capsys.readouterr()
    pretrain(monkeypatch, *flags, "0", "--skip-train")
    said, lines = capsys.readouterr().out, log.read_text().splitlines()
    assert "--skip-train: iteration 5 is evaluated, not trained" in said and "| lm loss:" not in said
    assert lines[:-2] == [*trained, later.strip()] and lines[-2:] == trained[-2:]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    pretrain(
        monkeypatch, *flags[:2], *"--train-iters 1 --skip-train --split 80,20,0 --save".split(), str(tmp_path / "no")
    )
    said = capsys.readouterr().out
    assert "iteration 0 is evaluated" in said and "no documents for the test split" in said
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--mock-data --tensor-model-parallel-size 2", 3, r"world size 3 is not divisible by tensor \(2\)"),
        ("--mock-data --global-batch-size 3", 2, "not a multiple"),
        ("--data-path nowhere/x_text_document", 1, r"nowhere/x_text_document.idx does not exist"),
        ("--data-path 0.5 a 0.5", 1, "--data-path"),
        ("--mock-data --load nowhere", 1, "no checkpoint folder nowhere"),
        ("--mock-data --device cuda", 1, "this machine has 0 GPU"),
        ("--mock-data --save /dev/null/x", 1, "/dev/null"),
        ("--mock-data --weight-decay nan", 1, "--weight-decay must be a finite number"),
        ("--mock-data --lr-warmup-iters -5", 1, "must not be negative"),
        ("--mock-data --lr-warmup-iters 5 --lr-warmup-fraction 0.1", 1, "not both"),
        ("--mock-data --group-query-attention", 1, "needs --num-query-groups"),
    ],
)
def test_mistakes_get_a_sentence(monkeypatch: pytest.MonkeyPatch, flags: str, world_size: int, message: str) -> None:
    if "cuda" in flags:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        pretrain(monkeypatch, "--train-iters", "1", *flags.split(), world_size=world_size)


def test_a_tokenizer_larger_than_the_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    pretrain(monkeypatch, "--mock-data", "--train-iters", "1", "--eval-interval", "0", "--save", folder)

    class LargerTokenizer:
        vocab_size, eod = 65, 0

    monkeypatch.setattr(training, "build_tokenizer", lambda *_: LargerTokenizer())
    with pytest.raises(ValueError, match="tokenizer has 65 entries but the model's vocabulary only 64"):
        pretrain(monkeypatch, "--mock-data", "--train-iters", "2", "--load", folder, "--use-checkpoint-args")


def test_an_error_of_one_rank_is_printed_by_that_rank(tmp_path: Path) -> None:
    script = tmp_path / "poisoned.py"
    script.write_text(
        "import os, pretrain_gpt\n"
        "from megatron.training.training import pretrain\n"
        "def forward(*arguments):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('token 99 is outside the vocabulary')\n"
        "    return pretrain_gpt.forward_step(*arguments)\n"
        "pretrain(pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, forward)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        [*command, *SHAPE, "--mock-data", "--train-iters", "1", "--eval-interval", "0"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "error: rank 1: token 99 is outside the vocabulary" in result.stderr


def test_leftovers_go_when_there_is_nothing_to_train_and_a_full_output_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log, save = tmp_path / "m.jsonl", tmp_path / "run"
    flags = ["--mock-data", "--eval-interval", "0", "--train-iters", "1", "--save", str(save), "--load", str(save)]
    flags += ["--metrics-path", str(log), "--lr", "0.01"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(REPOSITORY / "pretrain_gpt.py"), *SHAPE, *flags]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 0 and "No space left" in result.stderr and "Traceback" not in result.stderr
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "1" and len(metrics(log)) == 1
    whole = {path.name for path in (*save.iterdir(), *tmp_path.iterdir())}
    for leftover in (".probe-12", ".iter_0000001.previous", ".iter_0000003.saving", ".iter_0000000.removing"):
        (save / leftover).mkdir() if "iter" in leftover else (save / leftover).touch()
    (tmp_path / ".m.jsonl.abc.tmp").touch()
    pretrain(monkeypatch, *flags)
    assert {path.name for path in (*save.iterdir(), *tmp_path.iterdir())} == whole


def test_a_second_job_in_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    owner = "import sys; from pathlib import Path; from megatron.training.checkpoints.folder_lock import FolderLock\n"
    owner += "FolderLock(Path(sys.argv[1]), interval=0.1).acquire(print); print('mine', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", owner, str(tmp_path)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    flags = ["--mock-data", "--eval-interval", "0", "--train-iters", "1", "--lr", "0.01"]
    with pytest.raises(ValueError, match=rf"another job \(process {process.pid} on .*\) is saving to {tmp_path}"):
        pretrain(monkeypatch, *flags, "--save", str(tmp_path))
    process.kill()
    process.wait()
    pretrain(monkeypatch, *flags, "--save", str(tmp_path))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"
