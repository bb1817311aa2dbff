"""The p of the coherence: exact by counting whole vectors, the same for the same path in other units, and rare for chance."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.forecast.backtest import coherence, significance_of
from farcast_cli.forecast.significance import Significance
from farcast_cli.forecast.timeline import Timeline
from tests.tiny import statistic, wander

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.forecast.gram import Gram
    from tests.tiny import Arrays

SIZES = {"a": 40, "b": 5, "c": 120}
UNEVEN = (0, 10, 25, 300, 310, 700, 900, 905, 1000)


def _history(arrays: Arrays, steps: Sequence[int]) -> tuple[Gram, Timeline]:
    gram, _ = statistic(arrays, steps)
    return gram, Timeline(gram.steps, float(steps[-1]))


def _p(values: NDArray[np.float64], steps: Sequence[int] | None = None) -> Significance:
    return significance_of(*_history({"w": values}, steps or range(len(values))))


def _by_hand(whole: NDArray[np.float64], steps: Sequence[int]) -> float:
    """All sign patterns of all increments, each path built anew and its halves fitted by least squares."""
    places, middle = np.array(steps, dtype=float), (steps[0] + steps[-1]) / 2
    early, late = places <= middle, places >= middle
    moves, found = np.diff(whole, axis=0), []
    for signs in itertools.product((1, -1), repeat=len(moves)):
        path = np.concatenate([whole[:1], whole[0] + np.cumsum(np.array(signs)[:, None] * moves, axis=0)])
        slopes = [np.polyfit(places[half], path[half], 1)[0] for half in (early, late)]
        found.append(slopes[0] @ slopes[1])
    return float(np.mean(np.array(found) >= found[0] - 1e-9 * abs(found[0])))


@pytest.mark.parametrize("steps", [range(0, 600, 100), range(0, 700, 100), range(3, 11), UNEVEN])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_p_is_the_share_of_all_sign_patterns_whose_slopes_agree_as_much(seed: int, steps: Sequence[int]) -> None:
    arrays = wander(seed, num_snapshots=len(steps), sizes=SIZES, roughness=8)
    expected = _by_hand(np.concatenate(list(arrays.values()), axis=1), steps)
    assert significance_of(*_history(arrays, steps)).p == expected


def test_neighbours_share_a_sign_where_a_half_has_more_than_five_increments() -> None:
    """Twenty-one snapshots, ten increments a half: the blocks hold 3, 2, 1, 1 and 3, by their share in the slope."""
    walk = np.cumsum(np.random.default_rng(4).normal(size=(21, 6)), axis=0)
    sizes = _block_sizes(10)
    moves, found = np.diff(walk, axis=0), []
    for signs in itertools.product((1, -1), repeat=2 * len(sizes)):
        path = np.cumsum(np.vstack([walk[:1], np.repeat(signs, sizes * 2)[:, None] * moves]), axis=0)
        slopes = [np.polyfit(range(11), path[half], 1)[0] for half in (slice(11), slice(10, 21))]
        found.append(slopes[0] @ slopes[1])
    assert _p(walk).p == np.mean(np.array(found) >= found[0] - 1e-9 * abs(found[0]))


def _block_sizes(count: int) -> list[int]:
    """How many of a half's even increments are in each of five blocks; each counts in a slope as i (n - i)."""
    shares = np.array([i * (count + 1 - i) for i in range(1, count + 1)], dtype=float)
    middles = (np.cumsum(shares) - shares / 2) / shares.sum()
    return [int(np.sum((middles >= block / 5) & (middles < (block + 1) / 5))) for block in range(5)]


def test_uneven_snapshots_can_give_as_small_a_p_as_their_halves_hold_increments() -> None:
    """Five increments up to the middle of the second, two behind it: 2^7 patterns, and each is alike with all signs turned."""
    steps = (3, 10, 26, 31, 33, 44, 61, 75, 90)  # the middle, 46.5, falls between two
    assert _p(np.outer(steps, np.ones(3)), steps) == Significance(1 / 64, 1 / 64)


@pytest.mark.parametrize(
    ("num_snapshots", "smallest"),
    [
        (5, 1 / 8),
        (6, 1 / 8),
        (8, 1 / 32),
        (9, 1 / 128),
        (10, 1 / 128),
        (11, 1 / 512),
        (12, 1 / 512),
        (50, 1 / 512),
        (288, 1 / 512),
    ],
)
def test_a_straight_line_has_the_smallest_p_that_its_snapshots_can_give(num_snapshots: int, smallest: float) -> None:
    line = np.outer(np.arange(num_snapshots), np.random.default_rng(4).normal(size=50))
    assert _p(line) == Significance(smallest, smallest)


@pytest.mark.parametrize("num_snapshots", [10, 12, 20, 40, 288])
@pytest.mark.parametrize("periods", [1, 2, 3, 4])
def test_a_cycle_never_passes_however_coherent_it_looks(num_snapshots: int, periods: int) -> None:
    times = np.arange(num_snapshots) * 2 * np.pi * periods / num_snapshots
    cycle = np.stack([np.sin(times), np.cos(times)], axis=1)
    assert _p(cycle).p > 0.1
    assert not _p(cycle).passes


def test_p_does_not_depend_on_the_unit_of_the_weights_or_of_the_steps_or_on_how_they_are_split_into_tensors() -> None:
    whole = np.cumsum(np.random.default_rng(5).normal(size=(9, 30)), axis=0)
    expected = _p(whole, UNEVEN)
    assert 0.01 < expected.p < 1
    assert _p(1e-6 * whole + 100, UNEVEN) == expected
    assert _p(whole, tuple(7 * step + 3 for step in UNEVEN)) == expected
    assert significance_of(*_history({"a": whole[:, :11], "b": whole[:, 11:]}, UNEVEN)) == expected


def test_the_same_history_has_the_same_p_each_time() -> None:
    walk = np.cumsum(np.random.default_rng(6).normal(size=(30, 40)), axis=0)
    assert _p(walk) == _p(walk.copy())


def test_snapshots_after_the_origin_change_nothing() -> None:
    walk = np.cumsum(np.random.default_rng(7).normal(size=(20, 40)), axis=0)
    gram, _ = statistic({"w": walk}, range(20))
    assert significance_of(gram, Timeline(gram.steps, 10.0)) == _p(walk[:11])


def test_increments_of_zero_do_not_count() -> None:
    """A run that was saved twice at its start has one increment less to tell by."""
    line = np.outer([0, 0, 1, 2, 3, 4, 5, 6], np.ones(3))
    assert _p(line) == Significance(1 / 16, 1 / 16)


def test_a_run_that_never_moved_and_one_of_four_snapshots_have_no_p() -> None:
    for values in (np.ones((12, 3)), np.outer(np.arange(4), np.ones(3))):
        found = _p(values)
        assert math.isnan(found.p)
        assert not found.passes


def _walk(rng: np.random.Generator, num_snapshots: int, dimensions: int) -> NDArray[np.float64]:
    return np.cumsum(rng.normal(size=(num_snapshots, dimensions)), axis=0)


@pytest.mark.parametrize("dimensions", [3, 10, 30])
@pytest.mark.parametrize("num_snapshots", [6, 8, 10, 12, 20, 60])
def test_a_random_walk_passes_as_rarely_as_its_snapshots_allow(num_snapshots: int, dimensions: int) -> None:
    """One in 100, or the smallest p that they can give; 400 walks, within three standard errors."""
    rng = np.random.default_rng(100 * num_snapshots + dimensions)
    found = [_p(_walk(rng, num_snapshots, dimensions)) for _ in range(400)]
    level = max(0.01, found[0].smallest)
    assert np.mean([one.passes for one in found]) <= level + 3 * math.sqrt(level / 400)


def test_increments_over_very_different_spans_are_no_more_likely_to_pass() -> None:
    rng, spans = np.random.default_rng(8), np.diff(UNEVEN)
    walks = [
        np.cumsum(np.vstack([np.zeros((1, 3)), rng.normal(size=(8, 3)) * np.sqrt(spans)[:, None]]), axis=0) for _ in range(400)
    ]
    assert np.mean([_p(walk, UNEVEN).passes for walk in walks]) <= 0.04


def test_noise_around_a_point_does_not_pass_whatever_its_coherence() -> None:
    rng = np.random.default_rng(9)
    settled = [rng.normal(size=(20, 3)) for _ in range(200)]
    assert max(coherence(*_history({"w": one}, range(20))) for one in settled) > 0.25
    assert not any(_p(one).passes for one in settled)
