"""The statistic that stands for a trajectory: inner products of its increments, per tensor.

For a tensor's snapshots w_0 .. w_{T-1} the basis is

    d_1 .. d_{T-1}   increments, d_t = w_t - w_{t-1}
    w_0              the first snapshot
    1                the constant

and the matrix holds every inner product of two of its R = T + 1 vectors, in float64. Every forecast that is linear in
the snapshots,

    w_hat(s + h) = w_s + sum_t c_t (w_t - w_{t-1})

is a vector of R coefficients; its norm, its least-squares fit and its error at any origin and lead are
algebra on this matrix. Increments rather than weights: inner products of raw weights cancel (errors up to 2e-3).

Shapes: K tensors, T snapshots, R = T + 1 basis vectors, M sampled elements.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of a trajectory's basis vectors. `matrix` is (K, R, R), `steps` (T,) in optimiser steps.

    Each tensor's matrix is scaled from its sample to all its elements, so that sums over tensors weigh them by size.
    """

    steps: NDArray[np.int64]
    matrix: NDArray[np.float64]

    @property
    def num_snapshots(self) -> int:
        return len(self.steps)

    def norms(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """|| sum_r c_r b_r || per tensor, (K,), for coefficients (K, R) or (R,)."""
        each = np.broadcast_to(coefficients, self.matrix.shape[:2])
        squared = np.einsum("kr,kr->k", each, np.einsum("krs,ks->kr", self.matrix, each))
        return np.asarray(np.sqrt(np.maximum(squared, 0.0)))

    def total_norm(self, coefficients: NDArray[np.float64]) -> float:
        """The norm over all tensors together."""
        return float(np.linalg.norm(self.norms(coefficients)))

    @property
    def moves(self) -> NDArray[np.float64]:
        """Inner products of the moves between neighbouring snapshots, all tensors together, (T - 1, T - 1)."""
        return np.asarray(self.matrix.sum(axis=0)[:-2, :-2])

    def move_cosines(self) -> NDArray[np.float64]:
        """Cosines between these moves, (T - 1, T - 1); nan where nothing moved."""
        sizes = np.sqrt(np.maximum(np.diag(self.moves), 0))
        products = np.outer(sizes, sizes)
        return np.asarray(np.divide(self.moves, products, out=np.full_like(products, np.nan), where=products > 0))

    def select(self, tensors: NDArray[np.bool_]) -> Gram:
        """The statistic of some of the tensors, by a mask (K,)."""
        return Gram(self.steps, self.matrix[tensors])

    def restrict(self, keep: Sequence[int]) -> Gram:
        """The statistic of a subset of the snapshots, given by their indices in ascending order."""
        change = self.change_of_basis(keep)
        return Gram(self.steps[list(keep)], change @ self.matrix @ change.T)

    def change_of_basis(self, keep: Sequence[int]) -> NDArray[np.float64]:
        """The subset's basis vectors in terms of these, (R', R): a step c' over the subset is c' @ this here."""
        change = np.zeros((len(keep) + 1, self.num_snapshots + 1))
        for row, (before, after) in enumerate(itertools.pairwise(keep)):
            change[row, before:after] = 1.0  # increments add up
        change[len(keep) - 1, : keep[0]] = 1.0  # the new first snapshot: the old one and the increments up to it
        change[len(keep) - 1, -2] = 1.0
        change[len(keep), -1] = 1.0
        return change


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled weights of all tensors: `values` (M, T) float32, `bounds` (K + 1,) rows of each, `sizes` (K,) elements."""

    values: NDArray[np.float32]
    bounds: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def select(self, tensors: NDArray[np.bool_]) -> Sample:
        """The sample of some of the tensors, by a mask (K,)."""
        counts = np.diff(self.bounds)
        bounds = np.concatenate([[0], np.cumsum(counts[tensors])])
        return Sample(self.values[np.repeat(tensors, counts)], bounds, self.sizes[tensors])

    def restrict(self, keep: Sequence[int]) -> Sample:
        return Sample(self.values[:, list(keep)], self.bounds, self.sizes)
