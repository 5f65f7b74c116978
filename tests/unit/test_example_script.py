"""The example script: the command that it would run, and what it says when something is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "mixtral_4x7b_example.sh"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with eight GPUs, a tokenizer, and nothing of the caller's own settings."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("torchrun", "python"):
        add_program(programs, name, "echo unused")
    add_program(programs, "nvidia-smi", 'for gpu in 0 1 2 3 4 5 6 7; do echo "GPU $gpu: some (UUID: $gpu)"; done')
    (tmp_path / "tokenizer").mkdir()
    return {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "CHECKPOINT_PATH": str(tmp_path / "chéck points"),
        "BLENDED_DATA": "0.6 a_text_document 0.4 b_text_document",
        "TOKENIZER_MODEL": str(tmp_path / "tokenizer"),
        "DRY_RUN": "1",
    }


def add_program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def run(environment: dict[str, str], *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT), *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def command(environment: dict[str, str], *arguments: str, folder: Path | None = None) -> list[str]:
    result = run(environment, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return words_of(result.stdout.splitlines()[-1])


def words_of(line: str) -> list[str]:
    """The words of a line that bash wrote with %q, read by bash: its locale may have made `$'...'` of letters."""
    bash = shutil.which("bash") or "bash"
    printed = subprocess.run([bash, "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True).stdout
    return [os.fsdecode(word) for word in printed.split(b"\0")[:-1]]


def values(words: list[str], flag: str) -> list[str]:
    """The words after the only occurrence of `flag`, up to the next flag."""
    assert words.count(flag) == 1, flag
    rest = words[words.index(flag) + 1 :]
    return rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]


def test_defaults_are_mixtral_4x7b_on_eight_gpus(machine: dict[str, str]) -> None:
    words = command(machine)
    assert Path(words[0]).name == "torchrun"
    assert str(SCRIPT.parent / "pretrain_gpt.py") in words
    expected = {
        "--nproc-per-node": "8", "--nnodes": "1", "--tensor-model-parallel-size": "4", "--seq-length": "4096",
        "--pipeline-model-parallel-size": "2", "--num-layers": "32", "--hidden-size": "4096", "--num-experts": "4",
        "--ffn-hidden-size": "14336", "--num-attention-heads": "32", "--num-query-groups": "8",
        "--rotary-base": "1000000", "--moe-router-topk": "2",
    }  # fmt: skip
    assert {flag: values(words, flag)[0] for flag in expected} == expected
    assert "--bf16" in words and "--sequence-parallel" in words
    assert values(words, "--data-path") == machine["BLENDED_DATA"].split()


def test_every_flag_is_one_that_the_trainer_knows(machine: dict[str, str]) -> None:
    from megatron.training.arguments import parse_arguments

    machine |= {"VOCAB_SIZE": "32000", "TENSORBOARD_DIR": "t", "METRICS_PATH": "m", "DATA_CACHE_PATH": "c"}
    words = command(machine)
    arguments, _ = parse_arguments(words[words.index(str(SCRIPT.parent / "pretrain_gpt.py")) + 1 :])
    assert arguments.model.params_dtype == "bfloat16"
    assert arguments.parallel.sequence_parallel
    assert arguments.training.exit_signal_handler
    assert (arguments.model.vocab_size, arguments.logging.metrics_path) == (32000, "m")


def test_low_memory_and_experts_on_several_gpus(machine: dict[str, str]) -> None:
    from megatron.training.arguments import parse_arguments

    words = command(machine | {"NUM_EXPERTS": "8", "TP": "1", "PP": "1", "EP": "8", "MEMORY": "low"})
    assert values(words, "--nproc-per-node") == ["8"]
    arguments, _ = parse_arguments(words[words.index(str(SCRIPT.parent / "pretrain_gpt.py")) + 1 :])
    assert arguments.parallel.expert_model_parallel_size == 8 and arguments.parallel.use_distributed_optimizer
    assert arguments.recompute.recompute_granularity == "full" and arguments.parallel.grad_reduce_in_bf16
    optimizer = arguments.optimizer
    kept = optimizer.main_params_dtype, optimizer.exp_avg_dtype, optimizer.exp_avg_sq_dtype
    assert kept == ("bf16-remainder", "bf16", "fp16")
    refused = run(machine | {"MEMORY": "little"})
    assert refused.returncode == 2 and "MEMORY must be low or empty, got 'little'" in refused.stderr


def test_load_equals_save_and_nothing_is_left_out_of_it(machine: dict[str, str]) -> None:
    words = command(machine)
    assert values(words, "--load") == values(words, "--save") == [machine["CHECKPOINT_PATH"]]
    assert not [word for word in words if word.startswith("--no-load") or word == "--finetune"]


def test_environment_overrides_and_arguments_are_passed_on(machine: dict[str, str], tmp_path: Path) -> None:
    machine |= {"DEVICE": "cpu", "PRECISION": "fp32", "TP": "2", "PP": "2", "NUM_LAYERS": "4", "SEQUENCE_PARALLEL": "0"}
    words = command(machine, "--exit-interval", "50", "--name", "two words", folder=tmp_path)
    assert values(words, "--nproc-per-node") == ["4"]
    assert values(words, "--device") == ["cpu"]
    assert values(words, "--num-layers") == ["4"]
    assert "--bf16" not in words and "--sequence-parallel" not in words
    assert words[-4:] == ["--exit-interval", "50", "--name", "two words"]


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        ("0.6 'my data/a' 0.4 b", ["0.6", "my data/a", "0.4", "b"]),
        ('"one two"', ["one two"]),
        ("a\n b\t0.5", ["a", "b", "0.5"]),
        ("$(touch planted) `id` *", ["$(touch", "planted)", "`id`", "*"]),
    ],
)
def test_data_paths_are_split_like_words_and_never_evaluated(
    machine: dict[str, str], tmp_path: Path, blend: str, expected: list[str]
) -> None:
    words = command(machine | {"BLENDED_DATA": blend}, folder=tmp_path)
    assert values(words, "--data-path") == expected
    assert not (tmp_path / "planted").exists()


def test_an_existing_prefix_with_spaces_is_one_path(machine: dict[str, str], tmp_path: Path) -> None:
    prefix = tmp_path / "my data_text_document"
    (tmp_path / "my data_text_document.idx").touch()
    assert values(command(machine | {"BLENDED_DATA": str(prefix)}), "--data-path") == [str(prefix)]


def test_several_machines_meet_at_the_master(machine: dict[str, str]) -> None:
    words = command(machine | {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "MAX_RESTARTS": "1"})
    assert values(words, "--node-rank") == ["1"]
    assert values(words, "--master-addr") == ["first"]
    assert values(words, "--master-port")[0] == "6000"
    assert values(words, "--max-restarts") == ["1"]
    # otherwise only the machine that lost a process would start again
    assert values(words, "--rdzv-backend") == ["c10d"] and values(words, "--rdzv-endpoint") == ["first:6000"]
    words = command(machine | {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first"})
    assert "--rdzv-backend" not in words
    assert "--standalone" not in words and "--local-addr" not in words


def test_torchrun_of_an_interpreter_runs_under_the_launcher(machine: dict[str, str], tmp_path: Path) -> None:
    python = tmp_path / "programs" / "python3"
    python.symlink_to(sys.executable)
    (tmp_path / "programs" / "torchrun").write_text(f"#!{python}\n")
    assert command(machine)[:2] == [str(python), str(SCRIPT.parent / "tools" / "launch.py")]


def test_one_machine_needs_no_name_that_resolves(machine: dict[str, str]) -> None:
    words = command(machine)
    assert "--standalone" in words and values(words, "--local-addr")[0] == "127.0.0.1"


@pytest.mark.parametrize("gpus", ["", "0,1,2"])
def test_too_few_gpus_say_how_many_and_what_to_change(machine: dict[str, str], gpus: str) -> None:
    result = run(machine | {"CUDA_VISIBLE_DEVICES": gpus})
    assert result.returncode == 2
    count = len(gpus.replace(",", ""))
    assert f"this machine has {count} GPUs, but 8 processes" in result.stderr
    for variable in ("TP", "PP", "GPUS_PER_NODE", "DEVICE=cpu"):
        assert variable in result.stderr


def test_gpus_are_counted_with_nvidia_smi(machine: dict[str, str]) -> None:
    assert run(machine | {"TP": "8", "GPUS_PER_NODE": "16"}).returncode == 2
    folder = Path(machine["PATH"].split(os.pathsep)[0])
    add_program(folder, "nvidia-smi", "echo 'NVIDIA-SMI has failed'; exit 9")
    assert "this machine has 0 GPUs" in run(machine).stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CHECKPOINT_PATH": ""}, "CHECKPOINT_PATH is not set"),
        ({"BLENDED_DATA": " "}, "BLENDED_DATA is not set"),
        ({"BLENDED_DATA": "0.6 'a 0.4 b"}, "BLENDED_DATA has a quote without its partner"),
        ({"TOKENIZER_MODEL": ""}, "TOKENIZER_MODEL is not set"),
        ({"TOKENIZER_MODEL": "/no/such"}, "there is no '/no/such'"),
        ({"DEVICE": "tpu"}, "DEVICE must be auto, cuda or cpu, got 'tpu'"),
        ({"PRECISION": "fp8"}, "PRECISION must be bf16, fp16 or fp32, got 'fp8'"),
        ({"TP": "two"}, "TP must be a whole number, got 'two'"),
        ({"PP": "0"}, "PP must be at least 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 is not below NNODES=2: machines are num"),
        ({"NUMA_BINDING": "core"}, "NUMA_BINDING must be node, socket, exclusive or core-complex, got 'core'"),
        ({"GPUS_PER_NODE": "6"}, "6 processes cannot be divided by TP x PP x EP = 8"),
    ],
)
def test_bad_settings_get_a_sentence(machine: dict[str, str], change: dict[str, str], message: str) -> None:
    result = run(machine | change)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_it_says_what_it_starts_from(machine: dict[str, str]) -> None:
    assert "starting from fresh weights" in run(machine).stdout
    folder = Path(machine["CHECKPOINT_PATH"])
    (folder / "iter_0000010").mkdir(parents=True)
    assert "no latest_checkpointed_iteration.txt" in run(machine).stdout
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    assert f"Loading from {folder}: 10" in run(machine).stdout


def test_a_dry_run_is_one_process_without_gpus_data_or_folders(machine: dict[str, str], tmp_path: Path) -> None:
    add_program(tmp_path / "programs", "nvidia-smi", "exit 1")
    add_program(tmp_path / "programs", "python", """printf '%s\\n' ran: "$@\"""")
    bare = {"PATH": machine["PATH"], "VOCAB_SIZE": "32000", "PRECISION": "fp16"}
    result = run(bare, "--dry-run", "0/8", "--gpu-memory", "80")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    words = lines[lines.index("ran:") :]
    assert words[:2] == ["ran:", str(SCRIPT.parent / "pretrain_gpt.py")]
    assert words[-4:] == ["--dry-run", "0/8", "--gpu-memory", "80"] and "--fp16" in words
    assert not {"--data-path", "--load", "--save", "--tokenizer-model"} & set(words)

    from megatron.training.arguments import parse_arguments

    assert parse_arguments(words[2:])[0].training.dry_run == "0/8"
    missing = run({"PATH": machine["PATH"]}, "--dry-run=0/8")
    assert missing.returncode == 2 and "nor VOCAB_SIZE" in missing.stderr


def test_processes_keep_near_their_gpus_if_asked(machine: dict[str, str], tmp_path: Path) -> None:
    machine["NUMA_BINDING"] = "node"
    if shutil.which("numactl", path=machine["PATH"]) is None:
        missing = run(machine)
        assert missing.returncode == 2 and "needs the program numactl: install it" in missing.stderr
    add_program(tmp_path / "programs", "numactl", "exit 0")
    words = command(machine)
    of_torchrun = words[: words.index(str(SCRIPT.parent / "pretrain_gpt.py"))]
    assert of_torchrun[-2:] == ["--numa-binding", "node"]
    assert "--numa-binding" not in command(machine | {"DEVICE": "cpu"})


def test_threads_are_those_of_the_cores_that_the_job_has(machine: dict[str, str], tmp_path: Path) -> None:
    add_program(tmp_path / "programs", "torchrun", "env")
    add_program(tmp_path / "programs", "nproc", "echo 24")
    assert "OMP_NUM_THREADS=3\n" in run(machine | {"DRY_RUN": "0"}).stdout


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1"])
def test_several_machines_need_an_address_that_all_can_reach(machine: dict[str, str], address: str) -> None:
    result = run(machine | {"NNODES": "2", "MASTER_ADDR": address})
    assert result.returncode == 2 and "the first of the 2 machines" in result.stderr


def test_gpus_get_settings_that_the_user_can_override(machine: dict[str, str], tmp_path: Path) -> None:
    add_program(tmp_path / "programs", "torchrun", "env")
    machine |= {"DRY_RUN": "0", "TRITON_CACHE_DIR": "/mine"}
    settings = dict(line.split("=", 1) for line in run(machine).stdout.splitlines() if "=" in line)
    assert settings["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert settings["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and settings["TRITON_CACHE_DIR"] == "/mine"
    del machine["TRITON_CACHE_DIR"]
    cache = tmp_path / f"triton-{os.getuid()}"
    assert f"TRITON_CACHE_DIR={cache}\n" in run(machine | {"TMPDIR": str(tmp_path)}).stdout
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.rmdir()
    cache.symlink_to(tmp_path / "programs")
    assert "TRITON_CACHE_DIR" not in run(machine | {"TMPDIR": str(tmp_path)}).stdout, "somebody's link"
    on_cpu = run(machine | {"DEVICE": "cpu"}).stdout
    assert "PYTORCH_ALLOC_CONF" not in on_cpu
