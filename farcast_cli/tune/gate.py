"""Whether a tuning is worth writing: a paired test on rows that it has not seen when it foretold them.

    d_i = loss before - loss after, of row i;   z = mean(d) / standard error of it, by groups of rows that belong together

All labelled rows are tuned on in the end. What judges them is cross-fitting: every group of rows is left out once, and
foretold by a tuning of the others. How far a tuning goes (its iterations, or its ridge) is chosen by what the rows left out
lose; for the verdict, the choice for a group is made by the other groups, so that no row helps to choose what judges it.

Shapes: n rows, p places of a path: the start first, then one for each iteration or ridge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Groups = NDArray[np.int64]

MIN_ROWS = 32
"""Rows; with fewer a z of 3 is not what a normal distribution says it is. Half as many must be different."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """The losses before and after of rows not seen, and how many standard errors their difference is from 0."""

    before: float
    after: float
    z: float
    threshold: float
    num_rows: int
    num_groups: int
    """Of rows that belong together: each is one piece of evidence."""
    judged_by: str = "rows left out"

    @property
    def is_accepted(self) -> bool:
        return self.z > self.threshold and self.after < self.before

    @property
    def reason(self) -> str:
        groups = f" in {self.num_groups} groups" if self.num_groups < self.num_rows else ""
        told = f"loss of {self.num_rows} rows not seen{groups} ({self.judged_by}) {self.before:.4g} -> {self.after:.4g}"
        if not self.after < self.before:
            return f"{told}: no gain"
        return f"{told}, z = {self.z:.1f} {'>' if self.is_accepted else '<='} {self.threshold:g}"


def judge(
    before: Array, after: Array, groups: Groups, *, threshold: float, shares: Array | None = None, judged_by: str = ""
) -> GateResult:
    """Compare the losses of the same rows.

    Args:
        before, after: (n,) losses.
        groups: (n,) equal numbers for rows that belong together: copies, or neighbours of one text, are no evidence of their own.
        shares: (n,) the rows' weights; None for equal ones.
    """
    weights = np.full(len(before), 1 / len(before)) if shares is None else shares / shares.sum()
    _, index = np.unique(groups, return_inverse=True)
    gains: Array = np.bincount(index, weights=weights * (before - after)).astype(np.float64)
    sizes: Array = np.bincount(index, weights=weights).astype(np.float64)
    before_and_after = float(weights @ before), float(weights @ after)
    counts = len(before), len(sizes)
    return GateResult(*before_and_after, z_of(gains, sizes), threshold, *counts, judged_by or "rows left out")


def z_of(gains: Array, sizes: Array) -> float:
    """Standard errors from 0 of the sum of groups' gains; 0 where nothing changed, infinite where all changed alike."""
    mean, count = float(gains.sum()), len(gains)
    if mean == 0 or count == 1:
        return 0.0
    spread = gains - mean * sizes
    error = math.sqrt(count / (count - 1) * float(spread @ spread))
    return mean / error if error > np.finfo(np.float64).eps * abs(mean) else math.copysign(math.inf, mean)


@dataclass(frozen=True, slots=True)
class Choice:
    """How far a tuning goes, and what rows lose whose choice was made without them, (n,)."""

    place: int
    losses: Array


def choose(table: Array, folds: Groups, shares: Array) -> Choice:
    """The place with the least loss of rows left out.

    Args:
        table: (p, n) what each row loses at each place, by a tuning without the row's fold.
        folds: (n,) numbers from 0.
        shares: (n,) the rows' weights.
    """
    sums = np.zeros((len(table), int(folds.max()) + 1))
    np.add.at(sums.T, folds, (table * shares).T)
    total = sums.sum(axis=1)
    chosen = np.argmin(total[:, None] - sums, axis=0)
    return Choice(int(np.argmin(total)), table[chosen[folds], np.arange(table.shape[1])])
