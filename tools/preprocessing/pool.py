"""Worker processes that encode blocks.

Each has its own pipe, so that one that is killed in the middle of an answer is noticed (with the shared pipe of
the standard library's executors the reader waits forever for the rest).
"""

import mmap
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from tools.preprocessing.reader import Block
from tools.preprocessing.worker import Encoder, Result

_BLOCKS_AHEAD = 3
# Room for the tokens of nearly every block; larger ones go through the pipe.
_SLOT_BYTES = 4 << 20


class WorkerDied(Exception):
    """A worker process ended without an answer."""


class WorkerPool:
    """Processes that encode with `encoder`; a single worker is this process itself.

    They are forked, and so begin with the vocabulary that is ready here, not with imports of their own. Nothing that
    they use may have threads by then.
    """

    def __init__(self, workers: int, encoder: Encoder) -> None:
        self._encoder = encoder
        context = get_context("fork")
        self._processes = []
        self._pipes: list[Connection] = []
        self._ahead = workers * _BLOCKS_AHEAD
        self._slots = Slots(self._ahead if workers > 1 else 0)
        for _ in range(workers if workers > 1 else 0):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            process = context.Process(target=_work, args=(encoder, theirs, self._slots, list(self._pipes)), daemon=True)
            self._processes.append(process)
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

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Result]]:
        """Every block, without its content, and what became of it, in order. Raises WorkerDied.

        There are never more than a few blocks for each worker in memory, whatever the size of the corpus.
        """
        if not self._processes:
            for each in blocks:
                yield each, self._encoder.encode(each)
            return
        done: dict[int, tuple[Block, Result]] = {}
        given = taken = 0
        block = next(blocks, None)
        while block is not None or taken < given:
            worker = min(range(len(self._processes)), key=lambda i: len(self._waiting[i]))
            if block is not None and given - taken < self._ahead and len(self._waiting[worker]) < _BLOCKS_AHEAD:
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
                number, answer = self._slots.receive(pipe)
            except (EOFError, OSError):
                raise self._death(worker) from None
            if isinstance(answer, Exception):
                raise answer
            done[number] = self._waiting[worker].pop(number), answer

    def _death(self, worker: int) -> WorkerDied:
        self._processes[worker].join(1)
        code = self._processes[worker].exitcode
        return WorkerDied(f"a worker process ended unexpectedly (status {code}; killed, or out of memory?)")


class Slots:
    """Memory that is shared with forked processes, through which arrays are handed over without a copy in the pipe.

    An answer's slot is its number modulo `count`: as long as answer n is in use, answer n + count must not be sent.
    """

    def __init__(self, count: int, size: int = _SLOT_BYTES) -> None:
        self._count, self._size = count, size
        self._memory = memoryview(mmap.mmap(-1, max(count, 1) * size))

    def send(self, pipe: Connection, number: int, content: Any) -> None:
        """Send answer `number`."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(content, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        sizes = [len(array) for array in arrays]
        fits = sum(map(_aligned, sizes)) <= self._size
        if fits:
            for slot, array in zip(self._slot(number, sizes), arrays):
                slot[:] = array
        pipe.send((number, head, sizes, fits))
        for array in arrays if not fits else ():
            pipe.send_bytes(array)

    def receive(self, pipe: Connection) -> tuple[int, Any]:
        """An answer and its number. Raises EOFError or OSError if the sender is gone."""
        number, head, sizes, fits = pipe.recv()
        arrays: Any = self._slot(number, sizes) if fits else [pipe.recv_bytes() for _ in sizes]
        return number, pickle.loads(head, buffers=arrays)

    def _slot(self, number: int, sizes: list[int]) -> Iterator[memoryview]:
        position = number % self._count * self._size
        for size in sizes:
            yield self._memory[position : position + size]
            position += _aligned(size)


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def _work(encoder: Encoder, pipe: Connection, slots: Slots, of_parent: list[Connection]) -> None:
    # The parent answers Ctrl-C for all.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Held open here, the parent's ends would hide its death from the other workers and from this one.
    for end in of_parent:
        end.close()
    messages: SimpleQueue[Any] = SimpleQueue()
    # A thread empties the pipe, so that the parent is never held up in giving while this process answers. When the
    # parent has died the pipe ends, and so does this process, whatever it is doing.
    threading.Thread(target=_receive, args=(pipe, messages), daemon=True).start()
    while True:
        number, block = messages.get()
        answer: Any
        try:
            answer = encoder.encode(block)
        except Exception as error:
            answer = ValueError(f"{block.path}, bytes {block.start} to {block.end}: {error}")
        slots.send(pipe, number, answer)


def _receive(pipe: Connection, messages: "SimpleQueue[Any]") -> None:
    while True:
        try:
            messages.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
