"""Runs a function on several gloo ranks, as an ordinary call."""

import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

# Children are forked from a server that has imported torch and the program once and started no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch", "torch.distributed", "distributed_testing", "model_testing"])


def _child(function: Callable[..., Any], rank: int, world_size: int, store: str, pipe: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=60),
            )
        result: tuple[bool, Any] = (True, function(rank, world_size, *args))
    except BaseException:
        result = (False, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(result, buffer)
    pipe.send_bytes(buffer.getvalue())
    pipe.close()


def _start_server() -> None:
    """Starts the server, unless it runs, with the modules of this process's path.

    Older Pythons' server ignores the path, and leaves what it does not find to be imported by every child.
    """
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(os.path.abspath, sys.path))):
        forkserver.ensure_running()


def _program(rank: int, world_size: int, port: int, output: str, flags: Sequence[str]) -> None:
    """A rank of pretrain_gpt.py, which ends the process with its status."""
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in place.items()}
    # the store is the test's, as it is the agent's under torchrun
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["pretrain_gpt.py", *flags]
    import pretrain_gpt
    from megatron.training.training import pretrain

    pretrain(pretrain_gpt.model_provider, pretrain_gpt.datasets_provider, pretrain_gpt.forward_step)


def run_program(world_size: int, folder: Path, *flags: str) -> str:
    """Runs pretrain_gpt.py on several ranks without torchrun, in half of its processor time; returns what they print.

    The ranks write to files in `folder`. Raises AssertionError with their text if one of them fails.
    """
    _start_server()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder / f"output of rank {rank}" for rank in range(world_size)]
    processes = [
        _context.Process(target=_program, args=(rank, world_size, store.port, str(output), flags), daemon=True)
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    text = "\n".join(output.read_text() for output in outputs)
    assert [process.exitcode for process in processes] == [0] * world_size, text
    return text


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(rank, world_size, *args)` on every rank; returns the results in rank order.

    `function` must be importable. Raises AssertionError with the first failing rank's traceback.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_child, args=(function, rank, world_size, str(Path(folder) / "store"), sender, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        results: list[Any] = [None] * world_size
        failures: list[str] = []
        waiting = dict(zip(pipes, range(world_size), strict=True))
        while waiting and not failures:
            ready = multiprocessing.connection.wait(list(waiting), timeout=120)
            if not ready:
                failures.append("no rank answered for two minutes")
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                if ok:
                    results[rank] = value
                else:
                    failures.append(f"rank {rank}: {value}")
        for process in processes:
            if failures:
                process.kill()
            process.join()
        assert not failures, failures[0]
    return results
