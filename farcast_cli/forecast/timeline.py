"""Places on a run's timeline as vectors over the Gram basis: a weight at any step, a slope or a mean over a window.

Knows how to read a trajectory at steps that lie between snapshots (linearly), and never looks past the origin.
Steps are floats here, since back-test origins fall between snapshots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_MIN_POINTS = 2


def evenly(count: int, most: int) -> list[int]:
    """Indices of at most so many of `count` places, evenly spread, the first and the last among them."""
    return [int(index) for index in np.linspace(0, count - 1, min(count, most)).round()]


@dataclass(frozen=True, slots=True)
class Timeline:
    """A history as seen from an origin: snapshots at `steps` (T,), of which those after `origin` are out of sight."""

    steps: NDArray[np.int64]
    origin: float

    @property
    def first(self) -> float:
        """The first step of the history, t_0."""
        return float(self.steps[0])

    @property
    def length(self) -> float:
        """The history's length in steps, L = s - t_0."""
        return self.origin - self.first

    @property
    def num_snapshots(self) -> int:
        """How many snapshots the origin can see, itself among them."""
        return int(np.searchsorted(self.steps, self.origin, side="right"))

    @property
    def places(self) -> list[float]:
        """The steps of the snapshots in sight, and the origin's where it lies between two."""
        seen = [float(step) for step in self.steps[: self.num_snapshots]]
        return seen if seen[-1] == self.origin else [*seen, self.origin]

    def at(self, step: float) -> NDArray[np.float64]:
        """The vector (R,) of w(step) - w_0, linear between snapshots.

        Raises:
            ValueError: a step before the history or after the origin.
        """
        if not self.first <= step <= self.origin:
            raise ValueError(f"step {step} is outside [{self.first}, {self.origin}]")
        vector = np.zeros(len(self.steps) + 1)
        after = min(int(np.searchsorted(self.steps, step, side="right")), len(self.steps) - 1)
        before = after - 1
        vector[:before] = 1.0
        vector[before] = (step - self.steps[before]) / (self.steps[after] - self.steps[before])
        return vector

    def slope(self, first: float, last: float) -> NDArray[np.float64]:
        """The least-squares slope per step over the snapshots of [first, last], as a vector (R,).

            v = sum_j (t_j - tbar) w_j / sum_j (t_j - tbar)^2

        `last` counts as a snapshot. Where the window holds no other, it reaches back to the snapshot before.
        """
        inside = [float(step) for step in self.steps if first <= step <= last]
        points = inside if inside and inside[-1] == last else [*inside, last]
        if len(points) < _MIN_POINTS:
            points = [float(self.steps[self.steps < last][-1]), *points]
        return self.slope_over(points)

    def mean_over(self, points: Sequence[float]) -> NDArray[np.float64]:
        """The mean weight over places of the timeline, each counting the same, as a vector (R,)."""
        return np.asarray(np.mean([self.at(point) for point in points], axis=0))

    def slope_over(self, points: Sequence[float]) -> NDArray[np.float64]:
        """The least-squares slope per step over two or more places of the timeline, as a vector (R,)."""
        centred = np.array(points) - np.mean(points)
        positions = np.stack([self.at(point) for point in points])
        return np.asarray(centred @ positions / (centred @ centred))

    def mean(self, first: float, last: float) -> NDArray[np.float64]:
        """The mean weight over [first, last] along the path between snapshots, as a vector (R,).

            sum_j (t_{j+1} - t_j) (w(t_j) + w(t_{j+1})) / 2 / (last - first)

        over the two ends and the snapshots between them: the trapezoid rule, exact because w is linear in between.
        """
        nodes = [first, *(float(step) for step in self.steps if first < step < last), last]
        lengths, values = np.diff(nodes), np.stack([self.at(node) for node in nodes])
        return np.asarray(lengths @ (values[1:] + values[:-1]) / 2 / (last - first))

    def before(self, origin: float) -> Timeline:
        """The same history seen from an earlier origin."""
        return Timeline(self.steps, origin)
