"""Settings that changed between a run and its continuation are named, unless they cannot change a number."""

import dataclasses
import json
from typing import Any

import pytest

from megatron.training.arguments import parse_arguments
from megatron.training.changed_settings import WITHOUT_EFFECT, changed_settings
from megatron.training.checkpoints.saver import checkpoint_namespace
from megatron.training.progress import Progress

FLAGS = """--num-layers 2 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 2 --num-experts 2 --vocab-size 64
--seq-length 8 --max-position-embeddings 64 --tokenizer-type NullTokenizer --train-iters 2"""


def settings(flags: str = "--data-path 0.5 a 0.5 b") -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(parse_arguments(f"{FLAGS} {flags}".split())[0])


def stored(flags: str = "--data-path 0.5 a 0.5 b") -> dict[str, Any]:
    """The settings as a checkpoint holds them, through JSON."""
    arguments = parse_arguments(f"{FLAGS} {flags}".split())[0]
    return json.loads(json.dumps(vars(checkpoint_namespace(arguments, Progress()))))


@pytest.mark.parametrize(
    "flags, phrase",
    [
        ("--data-path 0.5 a 0.5 b --clip-grad 2", "--clip-grad was 1.0, is 2.0"),
        ("--data-path 0.5 a 0.5 b --adam-beta2 0.95", "--adam-beta2 was 0.999, is 0.95"),
        ("--data-path 0.5 a 0.5 b --moe-aux-loss-coeff 0.1", "--moe-aux-loss-coeff was 0.0, is 0.1"),
        ("--data-path 0.5 a 0.5 b --reset-attention-mask", "--reset-attention-mask was False, is True"),
        ("--data-path 0.5 a 0.5 b --global-batch-size 4", "--global-batch-size was not given, is 4"),
        ("--data-path 0.5 a 0.5 b --grad-reduce-in-bf16", "--grad-reduce-in-bf16 was False, is True"),
        ("--data-path 0.6 a 0.4 b", "--data-path was 0.5 a 0.5 b, is 0.6 a 0.4 b"),
    ],
)
def test_what_changes_the_result_is_named(flags: str, phrase: str) -> None:
    assert changed_settings(stored(), settings(flags)) == [phrase]


def test_what_changes_nothing_is_not_named() -> None:
    same = (
        "--data-path 0.5 a 0.5 b --tensor-model-parallel-size 2 --num-workers 0 --lr 1 --eval-iters 3 --save elsewhere"
    )
    assert changed_settings(stored(), settings(same)) == []
    assert changed_settings({}, settings()) == [], "a checkpoint of another program"


def test_every_setting_is_named_or_known_to_be_without_effect() -> None:
    now = settings()
    for section in WITHOUT_EFFECT:
        unknown = set(WITHOUT_EFFECT[section]) - now[section].keys()
        assert not unknown, f"{section} has no {unknown}"
        named = changed_settings(
            dict.fromkeys(now[section], "another"), {**{s: {} for s in WITHOUT_EFFECT}, section: now[section]}
        )
        assert len(named) == len(now[section]) - len(WITHOUT_EFFECT[section])
    known = stored()
    missing = [name for section in WITHOUT_EFFECT for name in now[section] if name not in known]
    assert not missing, "not in a checkpoint, so never compared"
