"""A forecast with memory over leaps: the mean move of past stretches of training, continued.

A stretch is the training between two calls. Stretch k begins at the landing l_{k-1}, where the last leap put the run (or where
the run was, if there was no leap), and ends at the origin e_k; n_k is its length, in steps or in learning-rate time.

    v_k     = (e_k - l_{k-1}) / n_k                           the move of a stretch, per unit of its length
    m_k     = u_k / (1 - b^k),   u_k = b u_{k-1} + (1 - b) v_k,   b = 0.8     the mean move
    share_k = sum_j a^(k-j) <v_j, m_{j-1}> / sum_j a^(k-j) <m_{j-1}, m_{j-1}>,   a = 0.7
    g_k     = g_{k-1} exp(0.75 signal_k),   g_0 = 0.5         the gain, from .05 up to a limit
    w_hat   = e_k + g_k n m_k                                 n: the length of the stretch to come

The share says how much of the move that the memory foretold the last stretches made. A leap that went too far is taken back
by the training after it: v_k is measured from the landing on, so the share falls, below zero if need be, and the gain with it.
The signal is the share, within -1..1; where a loss is measured, steering.py adds to it.

Everything is linear in the files that are read (the memory, the landing, the origin; or at first some snapshots of the run),
so the inner products of their moves are all that is needed.

Sources: momentum on the moves of stretches of one worker is SNOO ("SNOO: Step-K Nesterov Outer Optimizer", arXiv 2510.15830);
on files, from the landing on, and with a gain that is steered by the share, it is ours.

Shapes: R basis vectors of the Gram matrix (gram.py), K tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

KEPT = 0.8  # b: .6 and .9 do as well on the small runs, .95 harms
SMOOTHED = 0.7  # a: a share of one stretch is mostly noise
SPEED = 0.75  # twice as fast is no better with a loss, and worse without
LEAST = 0.05  # the smallest gain, from which it can rise again
FIRST = 0.5  # g_0
AGREES = 0.05  # the share below which weights only diffuse, or training takes leaps back; a loss knows better
FULL_MEMORY = 3  # stretches, before which the memory is one direction and its noise


@dataclass(frozen=True, slots=True)
class Momentum:
    """What the memory knows beside the mean move itself: four numbers.

    Args:
        count: stretches remembered, k.
        gain: g_k.
        made, foretold: the two sums of the share.
    """

    count: int = 0
    gain: float = FIRST
    made: float = 0.0
    foretold: float = 0.0

    @property
    def share(self) -> float:
        """Of the foretold move, what the last stretches made; nan where nothing was foretold yet."""
        return self.made / self.foretold if self.foretold > 0 else math.nan

    @property
    def weight(self) -> float:
        """1 - b^k, which makes the running sum a mean."""
        return 1 - KEPT**self.count


@dataclass(frozen=True, slots=True)
class Remembered:
    """A memory with one stretch more: its numbers, the mean move (R,) per unit of length, and how alike the new stretch was."""

    momentum: Momentum
    mean: NDArray[np.float64]
    cosine: float = math.nan


def remember(
    known: Remembered | None, stretches: Iterable[tuple[NDArray[np.float64], float]], products: NDArray[np.float64]
) -> Remembered:
    """Add stretches, each a move (R,) over the basis and its length, to a memory; to none if `known` is None.

    Args:
        products: inner products (R, R) of the basis, all tensors together.

    Raises:
        ValueError: no stretch at all.
    """
    found = known
    for move, length in stretches:
        found = _with_stretch(found, move / length, products)
    if found is None:
        raise ValueError("expected a stretch to remember, found none")
    return found


def _with_stretch(known: Remembered | None, speed: NDArray[np.float64], products: NDArray[np.float64]) -> Remembered:
    if known is None:
        return Remembered(Momentum(count=1), speed)
    before, mean = known.momentum, known.mean
    made, foretold = float(speed @ products @ mean), float(mean @ products @ mean)
    momentum = replace(
        before,
        count=before.count + 1,
        made=SMOOTHED * before.made + made,
        foretold=SMOOTHED * before.foretold + foretold,
    )
    total = KEPT * before.weight * mean + (1 - KEPT) * speed
    size = math.sqrt(max(float(speed @ products @ speed) * foretold, 0.0))
    return Remembered(momentum, total / momentum.weight, made / size if size else math.nan)


def steered(momentum: Momentum, signal: float, *, limit: float) -> Momentum:
    """The same with the gain moved by a signal between -1 (leaps harm) and 1 (leaps fall short)."""
    if math.isnan(signal):
        return momentum
    gain = momentum.gain * math.exp(SPEED * min(max(signal, -1.0), 1.0))
    return replace(momentum, gain=min(max(gain, LEAST), limit))
