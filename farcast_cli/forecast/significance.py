"""How often chance alone would give a run as steady a drift: a test of the coherence S by the signs of the increments.

S is the cosine of the drifts of the history's halves. In few dimensions, or with few snapshots, two drifts are easily
alike by chance, and only the run's own increments tell how easily. The test is algebra on their summed Gram matrix.

Shapes: T snapshots, R basis vectors (see gram.py), B blocks of neighbouring increments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.forecast.gram import Gram

LEVEL = 0.01  # up to which a p speaks against chance, or the smallest that so few snapshots can give
BLOCKS = 5  # in each half: with single increments a cycle of 100 snapshots passed, so smooth is its path


@dataclass(frozen=True, slots=True)
class Significance:
    """The share of sign patterns that give as much, and the smallest that so few snapshots can give; nan for none."""

    p: float
    smallest: float

    @property
    def limit(self) -> float:
        """The largest p that passes: the level, or the smallest p that so few snapshots can give."""
        return max(LEVEL, self.smallest)

    @property
    def passes(self) -> bool:
        """Whether the p is as small as the level asks, or as small as it can be."""
        return self.p <= self.limit

    @property
    def weak(self) -> bool:
        """Whether there are too few snapshots for a p as small as the level asks."""
        return self.smallest > LEVEL


NOTHING = Significance(float("nan"), float("nan"))


def significance(gram: Gram, early: NDArray[np.float64], late: NDArray[np.float64]) -> Significance:
    """The p of Q = <v_early, v_late>, the numerator of S, where every increment's sign may as well be the other one.

        Q(e) = sum_ij e_i e_j a_i b_j <d_i, d_j>,   e_i = -1 or 1
        p    = share of the patterns with Q(e) >= Q(1, .., 1)

    Exact for a walk whose increments are independent and symmetric, whatever their covariances, and however different
    these are: snapshots need no even spacing. Where a half has more than 5 increments, neighbours share a sign: 5 blocks
    of about equal share in the half's slope. So neither a smooth cycle nor noise that lasts from one snapshot to the next
    passes for drift, and at most 2^9 patterns are tried: one tenth of a millisecond, 3 ms for 288 snapshots. Increments
    of zero do not count. It is weak with few snapshots: six of them give a p of .125 at least, ten of them .008.

    Args:
        early, late: the slopes of the history's halves as coefficients (R,). No increment is in both.

    Source: the sign-flip test (symmetry test) of R. A. Fisher, The Design of Experiments, 1935. Its use here is ours.
    """
    spans, products = np.diff(gram.steps), gram.matrix.sum(axis=0)[:-2, :-2]
    terms = _blocks(early[:-2], spans) @ products @ _blocks(late[:-2], spans).T
    terms = terms[terms.any(axis=1)][:, terms.any(axis=0)]
    if not terms.size:
        return NOTHING
    first, second = _patterns(len(terms)), _patterns(terms.shape[1])
    first = first[: len(first) // 2]  # Q(e) = Q(-e): the first sign stays
    found = first @ terms @ second.T
    rounding = 1e-9 * np.abs(terms).sum()  # patterns that rounding alone tells apart count as equal
    return Significance(float(np.mean(found >= found[0, 0] - rounding)), 1 / found.size)


def _blocks(slope: NDArray[np.float64], spans: NDArray[np.int64]) -> NDArray[np.float64]:
    """A slope's coefficients (T - 1,) as the sum of blocks (B, T - 1): one increment each, or 5 of about equal share."""
    inside = np.flatnonzero(np.abs(slope) > 1e-9 * np.abs(slope).max())  # the rest is rounding
    share = (slope * spans)[inside]  # of an even drift
    middles = (np.cumsum(share) - share / 2) / share.sum()
    numbers = (middles * BLOCKS).astype(int) if inside.size > BLOCKS else np.arange(inside.size)
    rows = np.zeros((len(inside), len(slope)))
    rows[numbers, inside] = slope[inside]
    return rows


def _patterns(count: int) -> NDArray[np.float64]:
    """All signs (2^n, n), the first row all ones; the first sign is one in the first half of the rows."""
    bits = np.arange(2**count)[:, None] >> np.arange(count)[::-1] & 1
    return np.where(bits, -1.0, 1.0)
