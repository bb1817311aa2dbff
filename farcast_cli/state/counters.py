"""Counters at a later step, from their values at the last few snapshots: exact, or not at all."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_TO_COUNT = 3  # values, for what no counter's name tells to be one; any two lie on a line
MIN_FOR_EPOCHS = 5  # values; three unknowns are fitted to them
MAX_EPOCH = 20_000  # steps; some tenths of a second
CLOSE = 1e-9  # relative; an epoch as a float is rounded
MOST = 0.9  # of its steps a schedule must have taken, for those that it missed to count as skipped


def extrapolate(series: Sequence[tuple[int, int | float]], target: int) -> int | Fraction | None:
    """Where a counter that rose in proportion to the step stands at `target`; None where it did not.

    Exact: rational arithmetic on (step, value), the origin last. Steps that a loss scaler skipped make a counter lag
    at times; then the last interval's rate holds.
    """
    if not all(math.isfinite(value) for _, value in series):
        return None
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


def in_epochs(series: Sequence[tuple[int, int | float]], target: int) -> int | Fraction | None:
    """A count whose epochs end with a shorter step, as where the last accumulated batches of an epoch are fewer.

    v(s) = v(0) + A * (s // U) + r * (s % U), with (U - 1) * r < A <= U * r: A is an epoch's rise, U its steps, r a
    step's rise. An epoch's own count has A = 1 and may be a fraction in between; any other count rises by whole numbers.
    None where no U explains all values, or several do and answer otherwise.

    Cost: U is tried up to the stretch that the series spans, or MAX_EPOCH.
    """
    if len(series) < MIN_FOR_EPOCHS or not all(math.isfinite(value) for _, value in series):
        return None
    exact = tuple((step, Fraction(value)) for step, value in series)
    from_zero = ((0, Fraction(0)), *exact)  # as where nothing was trained before
    found = _in_epochs(from_zero, target) or _in_epochs(exact, target)
    return int(found) if found is not None and found.denominator == 1 else found


@cache  # all BatchNorms of a model count the same
def _in_epochs(series: tuple[tuple[int, Fraction], ...], target: int) -> Fraction | None:
    longest = min(series[-1][0] - series[0][0], MAX_EPOCH)
    answers = [answer for length in range(2, longest + 1) if (answer := _at_length(series, length, target)) is not None]
    alike = answers and all(math.isclose(answer, answers[0], rel_tol=CLOSE) for answer in answers)
    return answers[0] if alike else None


def _at_length(series: Sequence[tuple[int, Fraction]], length: int, target: int) -> Fraction | None:
    """What `in_epochs` answers for epochs of so many steps; None where they do not explain the values."""
    (last, value), *others = reversed(series)
    moves = [(s // length - last // length, s % length - last % length, v - value) for s, v in others]
    solved = next((found for a, b in itertools.combinations(moves, 2) if (found := _solve(a, b))), None)
    if solved is None:
        return None
    rise, step = solved
    pairs = [(rise * x + step * y, v) for x, y, v in moves]
    is_whole = rise.denominator == step.denominator == 1 and all(found == v for found, v in pairs)
    is_share = math.isclose(rise, 1, rel_tol=CLOSE) and all(math.isclose(found, v, rel_tol=CLOSE) for found, v in pairs)
    if not (is_whole or is_share) or not (length - 1) * step < rise <= length * step * (1 + Fraction(CLOSE)):
        return None
    return value + rise * (target // length - last // length) + step * (target % length - last % length)


def _solve(first: tuple[int, int, Fraction], second: tuple[int, int, Fraction]) -> tuple[Fraction, Fraction] | None:
    """The (A, r) of two equations A x + r y = v."""
    (x0, y0, v0), (x1, y1, v1) = first, second
    area = x0 * y1 - x1 * y0
    return ((v0 * y1 - v1 * y0) / area, (x0 * v1 - x1 * v0) / area) if area else None


def lagging(series: Sequence[tuple[int, int | float]], target: int) -> int | None:
    """A counter that misses a step now and then, as Adam's and a schedule's do where a loss scaler skips one.

    From the last value on it rises at the fastest rate that was seen: skipped steps cannot be foretold.
    """
    if len(series) < 2:  # noqa: PLR2004 - a rate takes two points
        return target if series and series[0][0] == series[0][1] else None
    if not all(math.isfinite(value) for _, value in series):
        return None
    rates = _rates(series)
    if not rates or min(rates) < 0 or max(rates) <= 0:
        return None
    last, value = series[-1]
    return math.floor(Fraction(value) + max(rates) * (target - last))


def schedule_count_at(series: Sequence[tuple[int, int | float]], target: int) -> int | None:
    """How often a schedule was stepped by `target`: at each step, with some skipped, or once an epoch."""
    if len(series) > 1 and is_steady(series):
        new = extrapolate(series, target)
        return None if new is None else int(new)
    by_epoch = epoch_at(series, target)
    if by_epoch is not None:
        return by_epoch
    new = lagging(series, target)
    (first, low), (last, high) = series[0], series[-1]
    few_skipped = new is not None and high - low > MOST * (last - first) * max(_rates(series))
    return new if few_skipped else None


def _rates(series: Sequence[tuple[int, int | float]]) -> list[Fraction]:
    """How fast a counter rose per step, between each two snapshots."""
    pairs = itertools.pairwise(series)
    return [(Fraction(v1) - Fraction(v0)) / (s1 - s0) for (s0, v0), (s1, v1) in pairs if s1 > s0]
