"""A machine that is gone without a word, as after a power failure, ends the job on the others within its rounds."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import FLAGS, REPOSITORY

# Each rank says which process it is when it begins its second step, and waits there for the word to go on.
SCRIPT = """
import os, sys
from pathlib import Path

folder, gone = Path(sys.argv.pop(1)), sys.argv.pop(1)
from megatron.training.signals import remember_signals
remember_signals(sys.argv)
import pretrain_gpt
from megatron.training import heartbeat, training
heartbeat._INTERVAL = 0.5

usual = training.train_step

def step(trainer, source, progress, *rest):
    if progress.iteration == 1:
        rank = os.environ["RANK"]
        with open(folder / "reached", "w") as pipe:
            pipe.write(f"{rank} {os.getpid()}\\n")
        if rank == gone:
            open(folder / "never").read()
    return usual(trainer, source, progress, *rest)

training.train_step = step
training.pretrain(pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)
"""


def _machines(*commands: list[str]) -> list[subprocess.Popen]:
    """A torchrun with one rank for each command."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(commands)), "--nproc-per-node", "1"),
        *("--master-addr", "127.0.0.1", "--master-port", port, "--node-rank"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return [
        subprocess.Popen(
            [*launcher, str(number), *command],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number, command in enumerate(commands)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "words"), [(1, "rank 1 has given no sign of life"), (0, "the store of the job")])
def test_the_other_machine_ends(tmp_path: Path, gone: int, words: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for name in ("reached", "never"):
        os.mkfifo(tmp_path / name)
    job = [str(tmp_path / "script.py"), str(tmp_path), str(gone), *FLAGS, "--exit-signal-handler"]
    machines = _machines(job, job)
    ranks: dict[int, int] = {}
    try:
        while len(ranks) < 2:
            with open(tmp_path / "reached") as pipe:
                ranks |= {int(rank): int(pid) for rank, pid in (line.split() for line in pipe)}
        for pid in (machines[gone].pid, ranks[gone]):
            os.kill(pid, signal.SIGSTOP)
        output, _ = machines[1 - gone].communicate(timeout=200)
        assert machines[1 - gone].returncode != 0
        assert f"error: {words}" in output, output
    finally:
        for pid in (ranks.get(gone), *(machine.pid for machine in machines)):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for machine in machines:
            machine.communicate(timeout=60)


@pytest.mark.slow
def test_a_machine_that_lacks_a_checkpoint_ends_the_start_of_the_other(tmp_path: Path) -> None:
    """The flags are the same in a real job, where the file system is not mounted on that machine."""
    job = [str(REPOSITORY / "pretrain_gpt.py"), *FLAGS, "--distributed-timeout-minutes", "1"]
    machines = _machines(job, [*job, "--use-checkpoint-args", "--load", str(tmp_path / "not mounted")])
    outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1]
    first, second = (re.findall("error: .*", output) for output in outputs)
    assert len(first) == len(second) == 1 and "not mounted" in second[0], outputs
    assert first[0].replace("rank 1: ", "") == second[0]
