"""Worker processes that encode blocks.

Each has a pipe of its own, so that one that is killed in the middle of an answer is noticed (with the shared pipe of
the standard library's executors the reader waits for the rest for ever).
"""

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from megatron.core.tokenizers import Tokenizer
from tools.preprocessing.reader import Block
from tools.preprocessing.worker import Encoder, Plan, Result

_BLOCKS_AHEAD = 3


class WorkerDied(Exception):
    """A worker process ended without an answer."""


class WorkerPool:
    """Processes that wait for work; a single worker is this process itself.

    They start at once, so that they import what they need while the parent prepares the work.
    """

    def __init__(self, workers: int) -> None:
        # Not forked: the tokenizer's library may already have threads here, which a forked child would miss.
        context = get_context("spawn")
        self._processes = []
        self._pipes: list[Connection] = []
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            self._processes.append(process)
            self._pipes.append(ours)
            process.start()
            theirs.close()
        self._waiting: list[dict[int, Block]] = [{} for _ in self._processes]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes):
            pipe.close()
            process.join()

    def encode(self, plan: Plan, tokenizer: Tokenizer, blocks: Iterator[Block]) -> Iterator[tuple[Block, Result]]:
        """Every block, without its content, and what became of it, in order; to be called once. Raises WorkerDied.

        There are never more than a few blocks for each worker in memory, whatever the size of the corpus.
        """
        if not self._processes:
            encoder = Encoder(plan, tokenizer)
            for each in blocks:
                yield each, encoder.encode(each)
            return
        for worker, pipe in enumerate(self._pipes):
            try:
                pipe.send(plan)
            except OSError:
                raise self._death(worker) from None
        done: dict[int, tuple[Block, Result]] = {}
        given = taken = 0
        ahead = len(self._processes) * _BLOCKS_AHEAD
        block = next(blocks, None)
        while block is not None or taken < given:
            worker = min(range(len(self._processes)), key=lambda i: len(self._waiting[i]))
            if block is not None and given - taken < ahead and len(self._waiting[worker]) < _BLOCKS_AHEAD:
                self._give(worker, given, block)
                given += 1
                block = next(blocks, None)
                continue
            self._receive(done)
            while taken in done:
                yield done.pop(taken)
                taken += 1

    def _give(self, worker: int, number: int, block: Block) -> None:
        try:
            self._pipes[worker].send((number, block))
        except OSError:
            raise self._death(worker) from None
        self._waiting[worker][number] = block._replace(lines=None, columns=None)

    def _receive(self, done: dict[int, tuple[Block, Result]]) -> None:
        """Take the answers that are there, at least one."""
        for pipe in wait(self._pipes):
            assert isinstance(pipe, Connection)
            worker = self._pipes.index(pipe)
            try:
                number, answer = receive_arrays(pipe)
            except (EOFError, OSError):
                raise self._death(worker) from None
            if isinstance(answer, Exception):
                raise answer
            done[number] = self._waiting[worker].pop(number), answer

    def _death(self, worker: int) -> WorkerDied:
        self._processes[worker].join(1)
        code = self._processes[worker].exitcode
        return WorkerDied(f"a worker process ended unexpectedly (status {code}; killed, or out of memory?)")


def send_arrays(pipe: Connection, content: Any) -> None:
    """Send what holds arrays; these are sent from where they are."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(content, protocol=5, buffer_callback=arrays.append)
    pipe.send((head, len(arrays)))
    for array in arrays:
        pipe.send_bytes(array.raw())


def receive_arrays(pipe: Connection) -> Any:
    """What `send_arrays` sent; its arrays cannot be written to. Raises EOFError or OSError if the sender is gone."""
    head, count = pipe.recv()
    return pickle.loads(head, buffers=[pipe.recv_bytes() for _ in range(count)])


def _work(pipe: Connection) -> None:
    # The parent answers Ctrl-C for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    messages: SimpleQueue[Any] = SimpleQueue()
    # A thread empties the pipe, so that the parent is never held up in giving while this process answers. When the
    # parent has died the pipe ends, and so does this process, whatever it is doing.
    threading.Thread(target=_receive, args=(pipe, messages), daemon=True).start()
    plan: Plan = messages.get()
    encoder: Encoder | None = None
    while True:
        number, block = messages.get()
        answer: Any
        try:
            encoder = encoder or Encoder(plan)
            answer = encoder.encode(block)
        except Exception as error:
            answer = ValueError(f"{block.path}, bytes {block.start} to {block.end}: {error}")
        send_arrays(pipe, (number, answer))


def _receive(pipe: Connection, messages: "SimpleQueue[Any]") -> None:
    while True:
        try:
            messages.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
