"""A whole job that gets signals, or loses a rank: saved once, in order, and no rank is left hanging."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import CASES, DYING, FLAGS, REPOSITORY, assert_same_step, pretrain

# The ranks say in which phase they are, and wait there, the first time, until the test lets the lock go.
PHASES = """
import atexit, ctypes, fcntl, os, signal, sys
from pathlib import Path

folder, phase = Path(sys.argv.pop(1)), sys.argv.pop(1)
rank = int(os.environ["RANK"])

def leave(status, leave=os._exit):
    (folder / f"status {rank}").write_text(str(status))
    leave(status)

os._exit = leave
atexit.register(lambda: (folder / f"status {rank}").write_text("0"))

def hang():
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

def reached():
    with open(folder / "reached", "w") as pipe:
        pipe.write(f"{os.getpid()}\\n")
    with open(folder / "go") as go:
        fcntl.flock(go, fcntl.LOCK_SH)

def waiting(name, function):
    left = [reached] if name == phase else []
    def wrapped(*arguments, **keywords):
        if left:
            left.pop()()
        if phase == "loss" and name == "step" and arguments[2].iteration == 2:
            os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else hang()
        if phase == "error" and name == "step" and arguments[2].iteration == 2:
            hang() if rank == 0 else int("no number")
        return function(*arguments, **keywords)
    return wrapped

from megatron.training.signals import remember_signals
remember_signals(sys.argv)
waiting("import", lambda: None)()
import pretrain_gpt
from megatron.core import dist_checkpointing
from megatron.training import evaluation, training
training.train_step = waiting("step", training.train_step)
training.locate_checkpoint = waiting("start", training.locate_checkpoint)
dist_checkpointing.write_shards = waiting("save", dist_checkpointing.write_shards)
evaluation.run_microbatches = waiting("evaluation", evaluation.run_microbatches)
training.pretrain(pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
"""


class Job:
    """A job of two ranks under tools/launch.py, that waits in a phase."""

    def __init__(self, folder: Path, phase: str, *flags: str, processes: int = 2) -> None:
        self.folder, self.processes = folder, processes
        (folder / "script.py").write_text(PHASES)
        (folder / "go").touch()
        os.mkfifo(folder / "reached")
        self.go = open(folder / "go")  # noqa: SIM115
        fcntl.flock(self.go, fcntl.LOCK_EX)
        command = [
            *(sys.executable, str(REPOSITORY / "tools" / "launch.py"), "--standalone", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", str(processes), str(folder / "script.py"), str(folder), phase, *FLAGS),
            *("--save", str(folder / "save"), "--exit-signal-handler", *flags),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "200"
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ranks(self) -> list[int]:
        """Waits until all ranks are in the phase; returns their process numbers."""
        found: list[int] = []
        while len(found) < self.processes:
            with open(self.folder / "reached") as pipe:
                found += map(int, pipe.read().split())
        return found

    def finish(self) -> tuple[int, str, str]:
        """Lets the ranks go on; returns the launcher's status, output and errors."""
        self.go.close()
        output, errors = self.process.communicate(timeout=200)
        return self.process.returncode, output, errors

    def statuses(self) -> list[str]:
        """How each rank ended."""
        return [(self.folder / f"status {rank}").read_text() for rank in range(self.processes)]

    def steps(self) -> list[str]:
        """What is in --save."""
        return (
            sorted(entry.name for entry in (self.folder / "save").iterdir()) if (self.folder / "save").exists() else []
        )


TRACKER = "latest_checkpointed_iteration.txt"


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "saved"), [("import", 0), ("start", 0), ("step", 1), ("save", 2), ("evaluation", 2)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["TERM", "INT"])
def test_signals_to_everyone_save_once_and_end_in_order(
    tmp_path: Path, phase: str, saved: int, number: signal.Signals
) -> None:
    evaluating = ["--eval-interval", "2", "--eval-iters", "2"] if phase == "evaluation" else []
    job = Job(tmp_path, phase, "--save-interval", "2", *evaluating)
    for target in job.ranks() * 2 + [job.process.pid]:  # which passes on its own copy
        os.kill(target, number)
    status, output, errors = job.finish()
    assert (status, job.statuses()) == (0, ["0", "0"]), errors
    assert "Traceback" not in errors and "error:" not in errors
    if saved:
        assert job.steps() == [f"iter_{saved:07d}", TRACKER]
        assert output.count("saved iteration") == 1
        last = f"stopped by {number.name} at iteration {saved} of 6: everything is saved in {tmp_path / 'save'}"
    else:
        assert job.steps() == []
        last = f"stopped by {number.name} before the first step: there was nothing to save"
    assert output.splitlines()[-1].startswith(last) and output.count("stopped by") == 1


@pytest.mark.slow
def test_one_rank_that_is_asked_at_the_start_ends_all(tmp_path: Path) -> None:
    job = Job(tmp_path, "start")
    os.kill(job.ranks()[0], signal.SIGTERM)
    status, output, errors = job.finish()
    assert (status, job.statuses(), job.steps()) == (0, ["0", "0"], []), errors
    assert "stopped by SIGTERM before the first step" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "ended", "words"),
    [("loss", [0], "rank 1 does not answer"), ("error", [0, 1], "rank 1 has ended: invalid literal")],
)
def test_ranks_that_hang_end_after_one_that_is_gone(tmp_path: Path, phase: str, ended: list[int], words: str) -> None:
    job = Job(tmp_path, phase)
    status, _, errors = job.finish()
    assert status != 0
    assert [(tmp_path / f"status {rank}").read_text() for rank in ended] == ["1"] * len(ended)
    assert words in errors
    assert job.steps() == [] or job.steps() == [".save.lock"]


# The other machine's rank does not notice: its agent counts no failure, and joins those that start again.
UNAWARE = """
import ctypes, os, sys
from pathlib import Path
from megatron.training import training

usual, again = training.train_step, Path(sys.argv[1]).exists()

def unaware(trainer, source, progress, *rest):
    if progress.iteration == 4 and trainer.groups.world.rank == 0 and not again:
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
    return usual(trainer, source, progress, *rest)

training.train_step = unaware
"""


@pytest.mark.slow
def test_two_machines_start_again_together(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(UNAWARE + DYING)
    flags = [*CASES["tp2_bf16"].split(), "--save-interval", "2"]
    assert pretrain(2, *flags, "--save", str(tmp_path / "whole")).returncode == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    own = ["--save", str(tmp_path / "killed"), "--load", str(tmp_path / "killed")]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test", "--local-addr", "127.0.0.1"),
        *("--max-restarts", "1", str(script), str(tmp_path / "marker"), *FLAGS, *flags, *own),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    machines = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert (tmp_path / "marker").exists() and "resumed at iteration" in "".join(outputs)
    assert_same_step(tmp_path / "killed" / "iter_0000006", tmp_path / "whole" / "iter_0000006")
