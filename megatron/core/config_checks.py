"""Checks that configurations share; each raises ValueError with the flag and its value."""

import math
from dataclasses import fields


def require_positive(config: object, *names: str) -> None:
    """Refuses numbers of zero or less in the fields named; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:  # not so of NaN either
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


def require_finite(config: object) -> None:
    """Refuses NaN and infinity in every number of a configuration."""
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{field.name.replace('_', '-')} must be a finite number, got {value}")


def require_divisible(what: str, value: int, by: str, divisor: int) -> None:
    """Refuses a `value` that `divisor` does not divide; `what` and `by` are their names."""
    if value % divisor:
        raise ValueError(f"{what} ({value}) is not divisible by {by} ({divisor})")
