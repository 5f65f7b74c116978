"""Random damage to every kind of file that users bring ends in a result or in one sentence, soon and in little memory.

FUZZ_SECONDS is how long each parser is tried, a minute by default. What is found is reported with a folder that has the
damaged file; named NAME.SEED.FILE in regressions/TARGET it is tried in every run of the tests.
"""

import os
import random
import time
from pathlib import Path

import pytest
from fuzz_mutations import mutate
from fuzz_targets import TARGETS
from fuzz_testing import Hunt, hunt, replay

_REGRESSIONS = Path(__file__).with_name("regressions")


def told(done: Hunt) -> str:
    """The findings for people."""
    return "\n".join(f"input {each.number}, {each.kept}: {each.place}: {each.problem}" for each in done.findings)


@pytest.mark.parametrize("target", sorted(path.name for path in _REGRESSIONS.iterdir()))
def test_what_was_found_stays_mended(tmp_path: Path, target: str) -> None:
    inputs = sorted((_REGRESSIONS / target).iterdir())
    done = replay("fuzz_targets", target, tmp_path, inputs)
    assert not done.findings, told(done)
    assert done.inputs == len(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damage_ends_in_a_sentence(tmp_path: Path, target: str) -> None:
    # begins elsewhere every day, and says where: the numbers of a finding make it again
    first = int(time.time()) // 86400 * 1_000_000
    done = hunt("fuzz_targets", target, tmp_path, float(os.environ.get("FUZZ_SECONDS", "60")), first)
    assert not done.findings, told(done)
    assert done.inputs


@pytest.mark.parametrize(
    ("target", "problem"),
    [("raises", "AttributeError"), ("allocates", "MemoryError"), ("spins", "SIGPROF"), ("refuses", None)],
)
def test_planted_faults_are_found(tmp_path: Path, target: str, problem: str | None) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "good.seed0.a.json").write_text('{"kind": "good", "size": 3}')
    (kept / "other.seed0.a.json").write_text(f'{{"kind": null, "size": {1 << 40}}}')
    done = replay("planted_targets", target, tmp_path / "work", sorted(kept.iterdir()))
    assert [finding.number for finding in done.findings] == ([] if problem is None else [1]), told(done)
    assert problem is None or problem in done.findings[0].problem
    assert [path.read_bytes() for finding in done.findings for path in finding.kept.iterdir()] == [
        (kept / "other.seed0.a.json").read_bytes() for _ in done.findings
    ]


def test_mutations_are_made_again_and_reach_structure() -> None:
    seed = b'{"a": {"b": [1, "x"]}, "size": 300}'
    made = [mutate(random.Random(number), seed, [seed]) for number in range(3000)]
    assert made == [mutate(random.Random(number), seed, [seed]) for number in range(3000)]
    for piece in (b"null", b"9223372036854775808", b"\\ud800", b"[[[[", b"NaN", b'"a": []'):
        assert any(piece in each for each in made), piece
    assert len(set(made)) > 1500 and max(map(len, made)) <= 1 << 20
