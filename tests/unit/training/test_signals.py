"""Signals as requests: copies, impatience, a main thread that cannot run handlers, and patience that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from model_testing import tiny_arguments

from megatron.training import signals
from megatron.training.environment import Environment, time_to_save
from megatron.training.signals import INTERRUPTED, StoppedAtStart, StopSignal

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts the process's own handlers back."""
    before = {number: signal.getsignal(number) for number in signals.STOPS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    descriptor = signal.set_wakeup_fd(-1)
    if descriptor != -1:
        os.close(descriptor)


class Left(Exception):
    """Stands for the end of the process."""


def installed(saves: bool = True) -> StopSignal:
    """A StopSignal that has what it needs but no thread."""
    stop = StopSignal()
    stop._saves = saves

    def leave(status: int, sentence: str) -> None:
        raise Left(status, sentence)

    stop._leave = leave
    return stop


def test_sigterm_again_and_again_asks_for_the_same() -> None:
    stop = installed()
    stop.begin()
    for _ in range(10):
        stop._take(signal.SIGTERM)
    assert stop.received and stop.name == "SIGTERM"
    stop.end()


def test_three_separate_interrupts_end_the_process_and_copies_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = installed()
    for later in (0.0, 0.125, 0.375, 1.0, 0.25):  # three copies of the first, two of the second
        now += later
        stop._take(signal.SIGINT)
    assert stop._interrupts == 2
    now += 1.0
    with pytest.raises(Left) as left:
        stop._take(signal.SIGINT)
    assert left.value.args == (130, INTERRUPTED)


def test_patience_is_for_steps_and_never_for_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = installed()
    stop.begin()
    now = 100.0  # a step takes 100 s
    stop.end()
    assert stop.overdue(now) is None
    stop.begin()
    now = 110.0
    stop._take(signal.SIGTERM)
    assert stop.overdue(110 + 300) is None
    status, sentence = stop.overdue(110 + 301) or (0, "")
    assert status == 1 and "did not end within 300 s" in sentence
    stop.end()
    assert stop.overdue(1e9) is None  # saving
    stop.begin()  # a batch of an evaluation that began long after the signal
    assert stop.overdue(now + 60) is None


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    stop = installed()
    stop.join()
    with pytest.raises(StoppedAtStart):
        stop._handle(signal.SIGTERM, None)
    came = time.monotonic()
    assert stop.overdue(came + 2) is None
    assert stop.overdue(came + 4) == (0, stop.at_start())
    again = installed()
    again.join()
    with pytest.raises(StoppedAtStart):
        again._handle(signal.SIGTERM, None)
    again._handle(signal.SIGTERM, None)  # a copy interrupts nothing of what the first one began
    early = installed()
    early._handle(signal.SIGTERM, None)  # the ranks do not know of each other yet
    with pytest.raises(StoppedAtStart):
        early.join()


HANGING = """
import ctypes, signal, sys, threading
from megatron.training.signals import StopSignal, remember_signals
remember_signals(sys.argv)
import os
def leave(status, sentence):
    print(sentence, flush=True)
    os._exit(status)
stop = StopSignal()
stop.install(leave, saves="--exit-signal-handler" in sys.argv)
stop.join()
mutex = ctypes.create_string_buffer(64)
lock = ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
def tell(main=threading.get_native_id()):
    while True:  # until the main thread waits in the system's own lock
        with open(f"/proc/self/task/{main}/syscall") as place:
            if hex(ctypes.addressof(mutex)) in place.read():
                break
    print("ready", flush=True)
threading.Thread(target=tell, daemon=True).start()
lock(mutex)
"""


@pytest.mark.parametrize(
    ("flags", "number", "status", "words"),
    [
        (["--exit-signal-handler"], signal.SIGTERM, 0, "stopped by SIGTERM before the first step"),
        ([], signal.SIGINT, 130, "interrupted"),
        ([], signal.SIGTERM, -signal.SIGTERM, ""),
    ],
)
def test_a_main_thread_that_hangs_in_a_library_is_ended(flags: list[str], number: int, status: int, words: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, *flags], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status and words in output


WAITING = """
import sys, time
from megatron.training import initialize
from megatron.training.signals import remember_signals
remember_signals(sys.argv)
def sleep(seconds, sleep=time.sleep):
    print("waits", flush=True)
    sleep(seconds)
time.sleep = sleep
if "alone" in sys.argv:
    initialize._SPEAKER_PATIENCE = 0.5
def main(environment, ending, stop_signal):
    raise ValueError("--lr is wrong")
initialize.run(main)
"""


@pytest.mark.parametrize("flags", [[], ["--exit-signal-handler"], ["alone"]])
def test_an_error_that_all_share_is_left_to_the_first_rank_as_long_as_that_starts(flags: list[str]) -> None:
    environment = {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *flags],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "waits\n"
    if "alone" not in flags:  # as torchrun does once the first rank has spoken
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if "alone" in flags:
        assert (process.returncode, errors) == (1, "error: rank 1: --lr is wrong\n")
    else:
        assert (process.returncode, errors) == (-signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("version", "waits", "words"),
    [("2.11.0+cu128", True, "install torch 2.12"), ("2.13.0", False, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900")],
)
def test_too_little_time_to_save_is_said(version: str, waits: bool, words: str) -> None:
    arguments = tiny_arguments()
    training = replace(arguments.training, exit_signal_handler=True)
    arguments = replace(arguments, training=training, checkpoint=replace(arguments.checkpoint, save="folder"))
    environment = Environment(0, 1, 0, 1, launched=True, waits_for_saves=waits)
    assert words in (time_to_save(arguments, environment, version) or "")
    assert time_to_save(arguments, Environment(0, 1, 0, 1, launched=True), "2.13.0+cpu") is None
    assert time_to_save(arguments, Environment(0, 1, 0, 1), "2.11.0") is None
