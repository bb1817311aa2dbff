"""The shape of a learning rate's curve, found from factors of its peak: a warm-up, a level, and one of three falls.

A fall along a line or a root has two unknowns: the count that it begins at and its slope. Three points tell them, and that
the fall is one of these. A half wave to a share of the peak has three: four points at equal distances tell them. What is
found here is a proposal: whoever asks compares it with every factor that was seen.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.trainers.formulas import Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Factors = Sequence[tuple[int, float]]

MIN_ON_A_LINE = 3  # points; any two lie on one
MIN_ON_A_WAVE = 4
CLOSE = 1e-6  # to a whole number of steps, or to a share of six digits

_STRAIGHTENED: dict[str, Callable[[float], float]] = {
    "linear": lambda factor: 1 - factor,
    "1-sqrt": lambda factor: (1 - factor) ** 2,
}
"""By fall: what of a factor rises in proportion to the steps since the fall began."""


def shapes(factors: Factors) -> Iterator[Shape]:
    """The shapes that (count, factor) points allow, in order of their counts."""
    top = max(range(len(factors)), key=lambda index: factors[index][1])
    rising, falling = factors[:top], [point for point in factors[top:] if 0 < point[1] < 1]
    if len(factors) - top > 1 and falling:
        falls = [*_lines(falling), *_waves(falling)]
        yield from (
            replace(fall, warmup=rise.warmup, counts_from=rise.counts_from) for rise in _rises(rising) for fall in falls
        )
        return
    last = factors[-1][0]
    for rise in _rises(factors):  # what comes behind a warm-up that has not ended is not known
        yield replace(rise, known_to=rise.warmup) if last < rise.warmup else rise


def _rises(rising: Factors) -> Iterator[Shape]:
    """The warm-ups, counted from one or from zero, that the last point before the peak allows; none is one too."""
    below = [(count, factor) for count, factor in rising if 0 < factor < 1]
    if not below:
        yield Shape()
        return
    count, factor = below[-1]
    for first in (1, 0):
        warmup = round((count + first) / factor)
        if count < warmup:
            yield Shape(warmup, first)


def _lines(falling: Factors) -> Iterator[Shape]:
    if len(falling) < MIN_ON_A_LINE:
        return
    for fall, straightened in _STRAIGHTENED.items():
        (first, low), (last, high) = ((count, straightened(factor)) for count, factor in (falling[0], falling[-1]))
        if high > low:
            slope = (high - low) / (last - first)
            yield _fall(fall, last - high / slope, 1 / slope)


def _waves(falling: Factors) -> Iterator[Shape]:
    """Of four points at equal distances along 1 - R (1 - cos a): the distance in a, the first a, and R.

    (f1 - f4) / (f2 - f3) = 1 + 2 cos d, and (1 - f1) / (1 - f2) = (sin(a/2) / sin(a/2 + d/2))^2.
    """
    apart = (len(falling) - 1) // (MIN_ON_A_WAVE - 1)
    if not apart:
        return
    (c1, f1), (c2, f2), (c3, f3), (c4, f4) = falling[-1 - 3 * apart :: apart]
    cosine = ((f1 - f4) / (f2 - f3) - 1) / 2 if f2 != f3 else math.nan
    if not (c2 - c1 == c3 - c2 == c4 - c3 and -1 < cosine < 1):
        return
    distance, ratio = math.acos(cosine), math.sqrt((1 - f1) / (1 - f2))
    angle = 2 * math.atan2(ratio * math.sin(distance / 2), 1 - ratio * math.cos(distance / 2))
    if 0 < angle < math.pi:
        steps = math.pi * (c2 - c1) / distance
        yield _fall("cosine", c1 - angle * steps / math.pi, steps, 1 - (1 - f1) / math.sin(angle / 2) ** 2)


def _fall(kind: str, begin: float, steps: float, least: float = 0.0) -> Shape:
    """A fall whose numbers are whole, or of few digits, where they nearly are."""
    begin, steps = (round(value) if abs(value - round(value)) < CLOSE * steps else value for value in (begin, steps))
    least = round(least, 6) if abs(least - round(least, 6)) < CLOSE else least
    return Shape(fall_from=begin, fall_steps=steps, fall=kind, least=least, known_to=begin + steps)
