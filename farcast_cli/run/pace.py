"""A run's clock: the sum of its learning rates between two steps, along the history and for some steps after it.

A weight moves about as far as the rates of its steps add up to. So a stretch that is trained at half the rate counts half.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from farcast_cli.choices import ClockName


MAX_SCALE = 3.0  # as the limit of a matched norm: what a warm-up begins with tells little of what comes behind it


@dataclass(frozen=True, slots=True)
class Pace:
    """The mean learning rate of the steps between neighbouring `edges` (E,), as `rates` (E - 1,).

    Of several parameter groups it is one group's rate: the others' are constant multiples, and only ratios matter.
    Without edges it counts steps, and `why` says why.
    """

    edges: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        """Refuse what no run can have.

        Raises:
            ValueError: edges that do not rise, or a rate that is none.
        """
        rising = all(a < b for a, b in itertools.pairwise(self.edges))
        if not rising or len(self.rates) != max(0, len(self.edges) - 1) or any(not 0 <= rate < math.inf for rate in self.rates):
            raise ValueError("learning rates that are not of the steps between rising edges")

    @classmethod
    def of(cls, pieces: Iterable[tuple[int, int, float]]) -> Pace:
        """From (first step, last step, mean rate) of pieces that follow each other; equal neighbours become one."""
        edges: list[int] = []
        rates: list[float] = []
        for first, last, rate in pieces:
            if rates and rate == rates[-1]:
                edges[-1] = last
            else:
                edges += [last] if edges else [first, last]
                rates.append(rate)
        return cls(tuple(edges), tuple(rates))

    def reaching(self, first: int, last: int) -> Pace:
        """The same up to two steps, where rates are known: beyond its edges the rate is taken to go on as it is there."""
        if not self.rates:
            return self
        pieces = list(zip(self.edges, self.edges[1:], self.rates, strict=False))
        before = [(first, self.edges[0], self.rates[0])] if first < self.edges[0] else []
        after = [(self.edges[-1], last, self.rates[-1])] if self.edges[-1] < last else []
        return Pace.of([*before, *pieces, *after])

    @property
    def clock(self) -> ClockName:
        return "rate" if self.rates else "steps"

    def covers(self, first: float, last: float) -> bool:
        """Whether every rate between two steps is known; the number of steps always is."""
        return not self.rates or self.edges[0] <= first <= last <= self.edges[-1]

    def mean(self, first: float, last: float) -> float:
        """The mean rate of the steps from `first` to `last`; 1 where steps are counted.

        Exactly the rate itself where that is constant.

        Raises:
            ValueError: steps whose rates are not known, or no steps at all.
        """
        if not self.rates:
            return 1.0
        if not self.covers(first, last) or first == last:
            raise ValueError(f"rates from step {first} to {last}: known are those from {self.edges[0]} to {self.edges[-1]}")
        begin, end = bisect_right(self.edges, first) - 1, bisect_left(self.edges, last)
        rates = self.rates[begin:end]
        if len(set(rates)) == 1:
            return rates[0]
        bounds = [first, *self.edges[begin + 1 : end], last]
        return math.fsum(rate * (b - a) for rate, (a, b) in zip(rates, itertools.pairwise(bounds), strict=True)) / (
            last - first
        )

    def total(self, first: float, last: float) -> float:
        """The sum of the rates of the steps from `first` to `last`; the number of steps where those are counted."""
        return (last - first) * self.mean(first, last) if last > first else 0.0

    def scale(self, past: tuple[float, float], ahead: tuple[float, float]) -> float:
        """How much faster the run moves over one stretch than over another: the ratio of mean rates, at most 3.

        Exactly 1 where the rate is constant or not known.
        """
        before, after = self.mean(*past), self.mean(*ahead)
        return min(after / before, MAX_SCALE) if before > 0 else 1.0

    def lasts_until(self, origin: float, share: float) -> float:
        """Up to which step the rate stays at a share of the highest one up to `origin`; infinite where steps are counted.

        `origin` itself where the rate is lower already. At most the last step whose rate is known.
        """
        if not self.rates:
            return math.inf
        here = bisect_left(self.edges, origin)
        limit = share * max(self.rates[: max(1, here)])
        low = (edge for edge, rate in zip(self.edges[here:], self.rates[here:], strict=False) if rate < limit)
        return origin if self.rates[max(0, here - 1)] < limit else max(origin, next(low, self.edges[-1]))

    def clocked(self, wanted: ClockName | None, first: float, last: float) -> Pace:
        """The clock to use for a forecast that needs the rates between two steps: as wanted, else rates where all are known.

        Raises:
            UsageError: rates are wanted and not known.
        """
        if wanted == "steps":
            return Pace(why="as --clock asks")
        known = self if self.covers(first, last) else Pace(why=f"the learning rates after step {self.edges[-1]} are unknown")
        if wanted == "rate" and not known.rates:
            raise UsageError(f"--clock rate: {known.why}", hint="--clock steps, or no --clock")
        return known


STEPS = Pace()
"""The clock that counts steps."""
