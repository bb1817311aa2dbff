"""Forecasts as sums over snapshots: what the streaming pass applies, whatever method found it.

Shapes: K tensors, T snapshots read, R = T + 1 basis vectors (see forecast/gram.py), H horizons.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class LinearMap:
    """Forecasts as sums over snapshots, per horizon and tensor.

        w_hat = w_s + sum_t weights_t (w_t - w_s) + gain w_s + constant

    Args:
        weights: (H, K, T); the origin's own column is not used.
        gain, constant: (H, K); zero for every method but lfd2.
        origin: the origin's index among the T snapshots.
        moves: snapshots that hold moves of the weights in place of weights: they count as they are, with no w_s taken off.
        bare: forecasts that are written as the update alone, with no w_s added.
    """

    weights: NDArray[np.float64]
    gain: NDArray[np.float64]
    constant: NDArray[np.float64]
    origin: int
    moves: frozenset[int] = frozenset()
    bare: frozenset[int] = frozenset()

    @classmethod
    def from_updates(cls, updates: Sequence[NDArray[np.float64]], origin: int) -> LinearMap:
        """From updates (K, R) over the Gram basis, one for each horizon.

        c_t (w_t - w_{t-1}) summed over t gives snapshot t the weight c_t - c_{t+1}.
        """
        stacked = np.stack(updates)  # (H, K, R)
        increments = stacked[..., :-2]
        edges = np.zeros((*increments.shape[:-1], 1))
        weights = np.concatenate([edges, increments], axis=-1) - np.concatenate([increments, edges], axis=-1)
        base, constant = stacked[..., -2], stacked[..., -1]
        weights[..., 0] += base
        return cls(weights, base, constant, origin)

    @property
    def used(self) -> list[int]:
        """The snapshots that any forecast reads, the origin among them."""
        needed = np.any(self.weights != 0, axis=(0, 1))
        needed[self.origin] = True
        return [int(index) for index in np.flatnonzero(needed)]

    @cached_property
    def others(self) -> tuple[tuple[int, ...], ...]:
        """The snapshots other than the origin that each tensor's forecasts read, (K,); none where its update is zero."""
        needed = np.any(self.weights != 0, axis=0)
        needed[:, self.origin] = False
        return tuple(tuple(np.flatnonzero(row).tolist()) for row in needed)

    def restrict(self, keep: Sequence[int]) -> LinearMap:
        """The same over some of the snapshots, by their indices."""
        kept = list(keep)
        moves = frozenset(kept.index(index) for index in self.moves.intersection(kept))
        return replace(self, weights=self.weights[..., kept], origin=kept.index(self.origin), moves=moves)

    def with_copies(self, of: Sequence[int], trailing: Sequence[bool]) -> LinearMap:
        """The same with a row (C more of them) for each second copy of a weight.

            c_hat = c_s + sum_t weights_t (c_t - c_s) + gain c_s + constant

        A trailing copy c moves as its weight w does, c_hat - c_s = w_hat - w_s. One snapshot more, w_s itself, gives that: its
        weight is gain - sum_t weights_t.

        Args:
            of: (C,) the weight's row.
            trailing: (C,) whether it trails.
        """
        rows = list(of)
        weights = np.concatenate([self.weights, self.weights[:, rows]], axis=1)
        gain, constant = (np.concatenate([part, part[:, rows]], axis=1) for part in (self.gain, self.constant))
        if any(trailing):
            num_weights, (_, num_rows, num_files) = self.weights.shape[1], weights.shape
            differences = [t for t in range(num_files) if t != self.origin and t not in self.moves]
            trails = np.arange(num_rows) >= num_weights
            trails[num_weights:] &= np.array(trailing)
            back = np.where(trails, gain - weights[..., differences].sum(axis=-1), 0)
            weights = np.concatenate([weights, back[..., None]], axis=-1)
        return replace(self, weights=weights, gain=gain, constant=constant)

    def pick(self, horizons: Sequence[int], scale: float = 1.0) -> LinearMap:
        """Some of the horizons, their updates scaled."""
        picked = list(horizons)
        weights, gain, constant = (part[picked] * scale for part in (self.weights, self.gain, self.constant))
        bare = frozenset(picked.index(index) for index in self.bare.intersection(picked))
        return replace(self, weights=weights, gain=gain, constant=constant, bare=bare)
