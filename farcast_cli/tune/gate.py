"""Whether a tuning is worth writing: a paired test on rows that neither the tuning nor its early stopping has seen.

    d_i = loss before - loss after, of distinct row i;   z = mean(d) / (std(d) / sqrt(n))

Measured on real tunings: with z > 3 none of 2 accepted results did harm, with z > 2 two of 9, with any gain 10 of 29. On 300
made ones (bench/tune_gate.py) with z > 3 none of 76, with z > 2 none of 102, with any gain 7 of 147; early stopping alone 34 of
188.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_ROWS = 32
"""Distinct rows; with fewer a z of 3 is not what a normal distribution says it is."""


@dataclass(frozen=True, slots=True)
class GateResult:
    """The held-out losses before and after, and how many standard errors their difference is from 0."""

    before: float
    after: float
    z: float
    threshold: float
    num_rows: int

    @property
    def is_accepted(self) -> bool:
        return self.z > self.threshold and self.after < self.before

    @property
    def gain(self) -> float:
        """The share of the loss that is gone."""
        return 1 - self.after / self.before if self.before else 0.0

    @property
    def reason(self) -> str:
        sign = ">" if self.is_accepted else "<="
        return (
            f"held-out loss {self.before:.4g} -> {self.after:.4g} on {self.num_rows} rows,"
            f" z = {self.z:.1f} {sign} {self.threshold:g}"
        )


def judge(before: Array, after: Array, groups: NDArray[np.int64], *, threshold: float) -> GateResult:
    """Compare the losses of the same held-out rows.

    Args:
        before, after: (n,) losses.
        groups: (n,) equal numbers for equal rows, which count as one: copies are no evidence.
    """
    _, index = np.unique(groups, return_inverse=True)
    counts = np.bincount(index)
    gains = np.bincount(index, weights=before - after) / counts
    return GateResult(float(before.mean()), float(after.mean()), z_of(gains), threshold, len(gains))


def z_of(gains: Array) -> float:
    """Standard errors from 0; 0 where nothing changed, infinite where all changed alike."""
    mean = float(gains.mean())
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    if mean == 0 or math.isinf(error):
        return 0.0
    return mean / error if error else math.copysign(math.inf, mean)
