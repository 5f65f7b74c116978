"""With --manual-gc garbage is collected at chosen steps alone, and Python's own collector is on again afterwards."""

import gc
from collections.abc import Callable

import pytest

from megatron.training.config import TrainingConfig
from megatron.training.garbage import GarbageCollection


def run(monkeypatch: pytest.MonkeyPatch, before_step: Callable[[int], None] = lambda _: None, **flags: object) -> str:
    """What happens in four steps with an evaluation behind the second: c(ollection), s(tep), e(valuation)."""
    events: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: events.append("c"))
    garbage = GarbageCollection(TrainingConfig(train_iters=4, **flags))  # type: ignore[arg-type]
    with garbage.running():
        for iteration in range(1, 5):
            before_step(iteration)
            events.append("s")
            garbage.step(iteration)
            if iteration == 2:
                with garbage.evaluation():
                    events.append("e")
    return "".join(events)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "ssess"),
        ({"manual_gc_interval": 1}, "ssess"),
        ({"no_manual_gc_eval": True}, "ssess"),
        ({"manual_gc": True}, "csscecss"),
        ({"manual_gc": True, "manual_gc_interval": 2}, "cssccecssc"),
        ({"manual_gc": True, "manual_gc_interval": 3, "no_manual_gc_eval": True}, "cssescs"),
    ],
)
def test_when_garbage_is_collected(monkeypatch: pytest.MonkeyPatch, flags: dict[str, object], expected: str) -> None:
    states: list[bool] = []
    assert run(monkeypatch, lambda _: states.append(gc.isenabled()), **flags) == expected
    assert states == [not flags.get("manual_gc", False)] * 4 and gc.isenabled()


def test_an_error_leaves_pythons_collector_on() -> None:
    with pytest.raises(ValueError), GarbageCollection(TrainingConfig(train_iters=1, manual_gc=True)).running():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
