"""Marks of waiting belong to a thread, nest, and go with the block, whatever ends it."""

import threading

import pytest
import torch

from megatron.core import collectives
from megatron.core.waiting import to_host, waiting, waits


def test_a_mark_lasts_as_long_as_its_block() -> None:
    me = threading.get_ident()
    assert me not in waits()
    with waiting():
        assert waits()[me] == "other ranks"
        with waiting("the device"):
            assert waits()[me] == "the device"
        assert waits()[me] == "other ranks"
        with pytest.raises(ValueError), waiting("the device"):
            raise ValueError
        assert waits()[me] == "other ranks"
    assert me not in waits()


def test_collectives_are_marked_whatever_ends_them() -> None:
    me = threading.get_ident()
    assert collectives._marked(lambda number: (number, waits()[me]))(7) == (7, "other ranks")
    with pytest.raises(TypeError):
        collectives.all_reduce("no tensor")
    assert me not in waits()


def test_a_thread_knows_only_of_its_own_wait() -> None:
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with waiting():
            inside.set()
            assert over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    assert waits()[thread.ident] == "other ranks" and threading.get_ident() not in waits()
    over.set()
    thread.join()
    assert thread.ident not in waits()


def test_a_tensor_comes_to_the_host_as_it_is() -> None:
    tensor = torch.arange(3)
    assert to_host(tensor) is tensor
