"""The closed form of a linear layer with squared loss: all ridges at once, judged by rows left out, from one pass over W_0.

    minimise  sum_i s_i |r_i - U^T k_i|^2 + mu |W - W_0|^2,     r_i = y_i - z_i of W_0,     k_i the row's inner products

With the eigenvalues v of the weighted Gram matrix, the fit of all rows is T diag(v / (v + mu)) T^T R. So what a row loses when
it is left out is its residual over 1 - h_i (Allen's PRESS), for every mu and without another fit. All sums over the m outputs
are products of the small matrices G = A A^T and R A^T, with A = T^T R: they are added up over blocks of outputs, and no array
of n x m numbers is held.

Shapes: n rows tuned on, q rows left out, m outputs, b outputs of a block, r eigenvalues; R (n, b), A (r, m), T (n, r), G (r, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.tune.delta import multiplied

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RIDGES = tuple(float(share) for share in np.logspace(2, -8, 101))
"""Of the rows' mean share of the eigenvalues; the rows left out choose."""
LEAST = 1e-14  # of the largest eigenvalue: what is below is rounding


@dataclass(slots=True)
class Ridge:
    """The rows tuned on by their eigenvectors, and what has been added up of their residuals.

    Where some rows are left out, they judge; else each row is left out by itself.
    """

    root: Array
    """Square roots of the shares s, (n,)."""
    values: Array
    vectors: Array
    """T (n, r)."""
    lift: Array
    """(r', r): U = lift diag(1 / (v + mu)) A."""
    left_out: Array | None
    """(q, r): what the rows left out make of 1 / (v + mu) A; None where each row is left out by itself."""
    lengths: Array
    cross: Array
    gram: Array
    turned: Array | None
    """A, where it is needed for `factors`."""
    num_outputs: int = 0

    @classmethod
    def of(cls, overlap: Array, shares: Array, *, is_dual: bool, left_out: Array | None = None, num_outputs: int = 0) -> Ridge:
        """Of K (n, r') of the rows tuned on, and that (q, r') of the rows left out.

        Args:
            num_outputs: m, for one who asks for `factors`.
        """
        root = np.sqrt(shares)
        if is_dual:
            values, vectors = np.linalg.eigh(root[:, None] * overlap * root)
            values, lift = np.maximum(values, 0), root[:, None] * vectors
        else:
            scaled = root[:, None] * overlap
            values, basis = np.linalg.eigh(scaled.T @ scaled)
            values = np.where(values > LEAST * values[-1], values, 0)
            roots = np.sqrt(values)
            inverse = np.divide(1, roots, out=np.zeros_like(roots), where=roots > 0)
            vectors, lift = scaled @ (basis * inverse), basis * roots
        judged = len(overlap) if left_out is None else len(left_out)
        places = None if left_out is None else left_out @ lift
        size = len(values)
        sums = np.zeros(judged), np.zeros((judged, size)), np.zeros((size, size))
        return cls(root, values, vectors, lift, places, *sums, np.empty((size, num_outputs)) if num_outputs else None)

    def add(self, residual: Array, left_out: Array | None = None) -> None:
        """The next outputs: R (n, b), and that of the rows left out (q, b)."""
        scaled = self.root[:, None] * residual
        turned = self.vectors.T @ scaled
        if self.left_out is None:
            rest = scaled - self.vectors @ turned if len(self.values) < len(scaled) else np.zeros_like(scaled)
        else:
            assert left_out is not None  # noqa: S101 - the caller's rows
            rest = -left_out
        self.lengths += (rest * rest).sum(axis=1)
        self.cross += rest @ turned.T
        self.gram += turned @ turned.T
        if self.turned is not None:
            self.turned[:, self.num_outputs : self.num_outputs + residual.shape[1]] = turned
        self.num_outputs += residual.shape[1]

    def strengths(self, ridge: float | None) -> list[float]:
        """Every mu that is tried, from the strongest; `ridge` is that of the mean over the outputs."""
        if ridge is not None:
            return [ridge * self.num_outputs / 2]
        mean = float(self.values.sum()) / len(self.vectors) or 1.0
        return [share * mean for share in RIDGES]

    def losses(self, strengths: list[float]) -> Array:
        """What the rows that are left out lose, for every mu, (number of mu, n or q)."""
        factor = self._factor()
        found = np.empty((len(strengths), len(self.lengths)))
        for row, mu in zip(found, strengths, strict=True):
            share = (mu if self.left_out is None else 1.0) / (self.values + mu)
            kept = self._left(share) if self.left_out is None else 1.0
            row[:] = self._lost(share, factor) / kept**2
        return found

    def fitted(self, mu: float) -> Array:
        """What the rows tuned on lose, (n,)."""
        return self._lost(mu / (self.values + mu), self._factor())

    def change(self, residual: Array, mu: float) -> Array:
        """What a fit without the row adds to its outputs, (n, m), of R (n, m) of all outputs."""
        assert self.turned is not None  # noqa: S101 - the caller has asked for it
        fitted = (self.vectors * (self.values / (self.values + mu))) @ self.turned / self.root[:, None]
        return residual - (residual - fitted) / self._left(mu / (self.values + mu))[:, None]

    def factors(self, mu: float) -> Array:
        """U (r', m); A is gone then."""
        assert self.turned is not None  # noqa: S101 - the caller has asked for it
        made, self.turned = self.turned, None
        return multiplied(self.lift / (self.values + mu), made)

    def _factor(self) -> Array:
        """F (r, f) with F F^T = G."""
        sizes, turn = np.linalg.eigh(self.gram)
        kept = sizes > LEAST * max(sizes[-1], 0.0)
        return np.asarray(turn[:, kept] * np.sqrt(sizes[kept]))

    def _lost(self, share: Array, factor: Array) -> Array:
        """Squared lengths, over the outputs, of rest + (the rows' places) diag(share) A."""
        moved = (self.vectors if self.left_out is None else self.left_out) * share
        squares = self.lengths + 2 * (moved * self.cross).sum(axis=1) + ((moved @ factor) ** 2).sum(axis=1)
        weights = self.root**2 if self.left_out is None else 1.0
        return np.asarray(np.maximum(squares, 0) / weights / self.num_outputs)

    def _left(self, share: Array) -> Array:
        """1 - h of every row; mu / (v + mu) are the shares."""
        square = self.vectors**2
        left = square @ share
        if len(self.values) < len(square):
            left += 1 - square.sum(axis=1)
        return np.maximum(left, np.finfo(np.float64).eps)
