"""A rank or a store that gives no sign of life is lost; one that is busy, done, or late together with all is not."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron.training import heartbeat
from megatron.training.heartbeat import Heartbeat


def _job(ranks: int) -> tuple[list[Heartbeat], list[str]]:
    """Heartbeats whose rounds are taken by hand, and what they tell."""
    store, told = dist.HashStore(), list[str]()
    return [Heartbeat(store, rank, ranks, told.append) for rank in range(ranks)], told


def test_the_first_rank_misses_the_one_that_is_silent() -> None:
    (first, gone, alive, done), told = _job(4)
    for one in (gone, alive, first):
        one.beat()
    done.stop()
    for number in range(1, 2 * heartbeat._ROUNDS):
        assert bool(told) is (number > heartbeat._ROUNDS), number
        if number % 2:  # seldom is often enough
            alive.beat()
        first.beat()
    assert all(sentence.startswith("rank 1 has given no sign of life for 90 s") for sentence in told)


def test_a_rank_that_was_gone_before_its_first_beat_is_missed() -> None:
    (first, _), told = _job(2)
    for _ in range(heartbeat._ROUNDS):
        first.beat()
    assert told[0].startswith("rank 1 has")


def test_who_was_not_scheduled_itself_blames_nobody() -> None:
    """A round without a beat is one round, however long it lasted: all may have been suspended."""
    (first, other), told = _job(2)
    for _ in range(3 * heartbeat._ROUNDS):
        first.beat()
        first.beat()
        first.watch()
        other.beat()
        other.watch()
    assert not told


def test_a_store_that_does_not_answer_is_missed() -> None:
    (_, other), told = _job(2)
    other.beat()
    for _ in range(heartbeat._ROUNDS):
        other.watch()
    assert not told  # the first of these saw the beat
    other.watch()
    assert len(told) == 1 and told[0].startswith(
        "the store of the job, on the first machine, has not answered for 90 s"
    )


def test_a_store_that_is_gone_is_missed_unless_the_rank_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.01)
    server = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    told: list[str] = []
    told_by_done: list[str] = []
    over = threading.Event()

    def lost(sentence: str) -> None:
        told.append(sentence)
        over.set()

    client = dist.TCPStore("localhost", server.port, None, False, timedelta(seconds=20), wait_for_workers=False)
    left, done = Heartbeat(client.clone(), 1, 2, lost), Heartbeat(client.clone(), 1, 2, told_by_done.append)
    left.start()
    done.start()
    done.stop()
    del server
    assert over.wait(60)
    left.stop()
    assert not told_by_done and all(sentence.startswith("the store of the job") for sentence in told)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())
