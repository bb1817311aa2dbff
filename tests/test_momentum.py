"""The memory over leaps: its algebra against plain numpy on whole weight vectors, and where its dial leads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.forecast.momentum import FIRST, KEPT, LEAST, SMOOTHED, SPEED, Momentum, Remembered, remember, steered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

LENGTHS = (20.0, 35.0, 5.0, 50.0, 20.0, 11.0)
SIZE = 400

MOST = 2.0


def by_share(momentum: Momentum, signal: float) -> Momentum:
    return steered(momentum, signal, limit=MOST)


@dataclass
class Oracle:
    """The formulas of the module, on the weights themselves (N,)."""

    speeds: list[Vector] = field(default_factory=list)
    means: list[Vector] = field(default_factory=list)

    def add(self, landing: Vector, end: Vector, length: float) -> None:
        """m_k is the weighted mean of all v_j, with the weights b^(k-j)."""
        self.speeds.append((end - landing) / length)
        weights = np.array([KEPT**age for age in range(len(self.speeds))][::-1])
        self.means.append(weights @ np.stack(self.speeds) / weights.sum())

    @property
    def share(self) -> float:
        pairs = list(zip(self.speeds[1:], self.means[:-1], strict=True))[::-1]
        made = sum(SMOOTHED**age * float(v @ m) for age, (v, m) in enumerate(pairs))
        foretold = sum(SMOOTHED**age * float(m @ m) for age, (_, m) in enumerate(pairs))
        return made / foretold

    @property
    def cosine(self) -> float:
        v, m = self.speeds[-1], self.means[-2]
        return float(v @ m / np.linalg.norm(v) / np.linalg.norm(m))


def moved(ends: Sequence[Vector]) -> tuple[list[Vector], Vector]:
    """Stretches between weights as moves over a basis of random directions, and the basis' inner products (R, R).

    The basis is not the moves themselves, nor orthogonal: what is right must not depend on it.
    """
    random = np.random.default_rng(5)
    moves = np.diff(np.stack(ends), axis=0)
    mixed = random.normal(size=(len(moves), len(moves)))
    basis = np.linalg.solve(mixed, moves)  # mixed @ basis = moves
    return list(mixed), basis @ basis.T


def wandering(seed: int, drift: float = 1.0) -> list[Vector]:
    """Weights at the ends of the stretches, on a drift with noise."""
    random = np.random.default_rng(seed)
    direction, ends = random.normal(size=SIZE), [random.normal(size=SIZE)]
    for length in LENGTHS:
        ends.append(ends[-1] + length * (drift * direction + random.normal(size=SIZE)))
    return ends


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_move_the_share_and_the_cosine_are_those_of_whole_weight_vectors(seed: int) -> None:
    ends, oracle, found = wandering(seed), Oracle(), None
    moves, products = moved(ends)
    basis = np.linalg.solve(np.stack(moves), np.diff(np.stack(ends), axis=0))
    for number, length in enumerate(LENGTHS):
        oracle.add(ends[number], ends[number + 1], length)
        found = remember(found, [(moves[number], length)], products)
        np.testing.assert_allclose(found.mean @ basis, oracle.means[-1], rtol=1e-9, atol=1e-12)
        assert found.momentum.count == number + 1
        if number:
            assert found.momentum.share == pytest.approx(oracle.share, rel=1e-9)
            assert found.cosine == pytest.approx(oracle.cosine, rel=1e-9)


def test_stretches_that_are_added_at_once_are_those_that_are_added_one_by_one() -> None:
    ends = wandering(7)
    moves, products = moved(ends)
    stretches = list(zip(moves, LENGTHS, strict=True))
    whole = remember(None, stretches, products)
    parts = remember(remember(None, stretches[:2], products), stretches[2:], products)
    np.testing.assert_array_equal(whole.mean, parts.mean)
    assert (whole.momentum, whole.cosine) == (parts.momentum, parts.cosine)


def test_one_stretch_foretells_nothing_and_is_the_mean_move_itself() -> None:
    found = remember(None, [(np.array([6.0]), 3.0)], np.eye(1))
    assert found.mean.tolist() == [2.0]
    assert found.momentum == Momentum(count=1, gain=FIRST)
    assert math.isnan(found.momentum.share)
    assert math.isnan(found.cosine)


def test_no_stretch_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        remember(None, [], np.eye(1))


def test_weights_that_do_not_move_at_all_have_no_share_and_no_cosine() -> None:
    found = remember(None, [(np.array([0.0]), 3.0)] * 3, np.eye(1))
    assert math.isnan(found.momentum.share)
    assert math.isnan(found.cosine)
    assert by_share(found.momentum, found.momentum.share) == found.momentum


# --- the gain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "factor"), [(1, math.exp(SPEED)), (0.2, math.exp(0.2 * SPEED)), (0, 1), (-0.4, math.exp(-0.4 * SPEED))]
)
def test_the_gain_moves_by_the_exponential_of_the_signal(signal: float, factor: float) -> None:
    assert by_share(Momentum(gain=0.5), signal).gain == pytest.approx(0.5 * factor)


def test_a_signal_counts_as_1_at_most_and_minus_1_at_least() -> None:
    assert by_share(Momentum(), 9.0) == by_share(Momentum(), 1.0)
    assert by_share(Momentum(), -9.0) == by_share(Momentum(), -1.0)


def test_a_signal_that_is_not_known_moves_nothing() -> None:
    assert by_share(Momentum(gain=0.7), math.nan).gain == 0.7


def test_the_gain_has_limits_on_both_sides() -> None:
    high = low = Momentum()
    for _ in range(20):
        high, low = by_share(high, 1.0), by_share(low, -1.0)
    assert (high.gain, low.gain) == (MOST, LEAST)


# --- where it leads in a loop of leaps -------------------------------------------------------------------------------

LENGTH = 10.0


def leaps(count: int, train: Callable[[Vector, int], Vector]) -> list[Momentum]:
    """A loop: train a stretch from the landing, remember, steer, leap. `train` gives the end of a stretch from a landing."""
    landing, mean, momentum, seen = np.zeros(SIZE), np.zeros(SIZE), Momentum(), list[Momentum]()
    for number in range(count):
        end = train(landing, number)
        basis = np.stack([end - landing, mean])
        known = Remembered(momentum, np.array([0.0, 1.0])) if number else None
        found = remember(known, [(np.array([1.0, 0.0]), LENGTH)], basis @ basis.T)
        momentum, mean = by_share(found.momentum, found.momentum.share), found.mean @ basis
        landing = end + momentum.gain * LENGTH * mean
        seen.append(momentum)
    return seen


def test_a_straight_line_raises_the_gain_to_its_limit() -> None:
    direction = np.random.default_rng(0).normal(size=SIZE)
    seen = leaps(6, lambda landing, _: landing + LENGTH * direction)
    assert [momentum.share for momentum in seen[1:]] == pytest.approx([1.0] * 5)
    assert [m.gain for m in seen] == pytest.approx([min(FIRST * math.exp(SPEED * k), MOST) for k in range(6)])


def test_a_leap_behind_a_wall_is_taken_back_and_the_share_falls_below_zero() -> None:
    """A straight line that ends: whatever lands behind it, training brings back."""
    direction = np.random.default_rng(0).normal(size=SIZE)
    seen = leaps(9, lambda landing, number: landing + LENGTH * direction if number < 3 else 60 * direction)
    assert seen[2].share == pytest.approx(1.0)
    assert seen[3].share < 0.5
    assert all(momentum.share < 0 for momentum in seen[4:])
    gains = [momentum.gain for momentum in seen[3:]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > gains[-1]


def test_weights_that_have_settled_bring_the_gain_to_its_lower_limit() -> None:
    """Noise around one place: training takes back the whole of every leap."""
    noise = np.random.default_rng(1).normal(size=(16, SIZE))
    seen = leaps(len(noise), lambda _, number: noise[number])
    assert all(momentum.share < 0 for momentum in seen[1:])
    assert seen[-1].gain < 2 * LEAST


def test_noise_keeps_the_gain_low() -> None:
    """Weights that only diffuse, in few dimensions: by chance a stretch agrees with the mean, or goes against it."""
    last = []
    for seed in range(40):
        noise = np.zeros((12, SIZE))
        noise[:, :30] = np.random.default_rng(seed).normal(size=(12, 30))
        last.append(leaps(12, lambda landing, number, noise=noise: landing + noise[number])[-1].gain)  # type: ignore[misc]
    assert np.median(last) < 1.3 * FIRST
    assert np.quantile(last, 0.9) < 1.5
