"""Ranks that hold up the others in every step."""

import statistics
from collections.abc import Iterable

# Ranks that a warning names; more of them are counted.
_MOST_NAMED = 8


def slow_ranks(busy_seconds: Iterable[list[float]]) -> str:
    """A sentence about ranks that worked several times longer than the others; empty without any.

    `busy_seconds` has, for each of some steps, the time in which each rank was not waiting.
    """
    steps = list(busy_seconds)
    totals = [sum(seconds) for seconds in zip(*steps, strict=True)]
    # the median of all but any rank above it, so that two ranks can be compared with each other
    typical = statistics.median(sorted(totals)[:-1] or totals)
    sentences = [
        f"rank {rank} is slow: it works {seconds / len(steps):.2f} s in a step, the others typically "
        f"{typical / len(steps):.2f} s"
        for rank, seconds in enumerate(totals)
        if seconds > 3 * typical and seconds - typical > 0.2
    ]
    more = f"; and {len(sentences) - _MOST_NAMED} more" if len(sentences) > _MOST_NAMED else ""
    return "; ".join(sentences[:_MOST_NAMED]) + more
