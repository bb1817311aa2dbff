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

    def pick(self, horizons: Sequence[int], scale: float = 1.0) -> LinearMap:
        """Some of the horizons, their updates scaled."""
        picked = list(horizons)
        weights, gain, constant = (part[picked] * scale for part in (self.weights, self.gain, self.constant))
        bare = frozenset(picked.index(index) for index in self.bare.intersection(picked))
        return replace(self, weights=weights, gain=gain, constant=constant, bare=bare)
