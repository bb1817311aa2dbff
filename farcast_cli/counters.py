"""Counters at a later step, from their values at the last few snapshots: exact, or not at all."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def extrapolate(series: Sequence[tuple[int, int | float]], target: int) -> int | Fraction | None:
    """Where a counter that rose in proportion to the step stands at `target`; None where it did not.

    Exact: rational arithmetic on (step, value), the origin last. Steps that a loss scaler skipped make a counter lag
    at times; then the last interval's rate holds.
    """
    if len(series) < 2:  # noqa: PLR2004 - a rate takes two points
        return target if series and series[0][0] == series[0][1] else None
    (s0, v0), (s1, v1) = ((step, Fraction(value)) for step, value in series[-2:])
    if v1 <= v0 or s1 == s0:
        return None
    new = v1 + (v1 - v0) / (s1 - s0) * (target - s1)
    return int(new) if new.denominator == 1 else new


def is_steady(series: Sequence[tuple[int, int | float]]) -> bool:
    """Whether a counter rose by the same rate between all its points."""
    (s0, v0), (s1, v1) = series[0], series[-1]
    return all((v - v0) * (s1 - s0) == (v1 - v0) * (s - s0) for s, v in series)


def epoch_at(series: Sequence[tuple[int, int | float]], target: int) -> int | None:
    """A whole epoch counter at `target`: floor(step / E) for every epoch length E that fits all its values.

    None where the values do not say, because different lengths fit that give different answers.
    """
    if any(value < 0 or step < 0 for step, value in series) or not any(value for _, value in series):
        return None
    low = max(Fraction(step) / (int(value) + 1) for step, value in series)  # E > low
    high = min(Fraction(step) / int(value) for step, value in series if value)  # E <= high
    if low >= high:
        return None
    shortest = math.floor(low) + 1
    answers = {target // shortest, target // math.floor(high)} if math.floor(high) >= shortest else set()
    return answers.pop() if len(answers) == 1 else None
