"""Places, slopes and means on a timeline, as vectors over the basis, equal those of the weights themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farcast_cli.forecast.timeline import Timeline
from tests.tiny import basis, wander, weights_at

STEPS = np.array([100, 200, 250, 400, 500, 800])
VALUES = wander(1, num_snapshots=6, sizes={"w": 9})["w"]
ROUNDING = 1e-12  # sums of a few numbers near 1 in float64


def _fitted_slope(points: list[float]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A line fitted by numpy through the weights at some points."""
    weights = np.stack([weights_at(VALUES, STEPS.tolist(), point) for point in points])
    return np.asarray(np.polyfit(points, weights, 1)[0])


@given(step=st.floats(100, 800))
def test_a_place_between_snapshots_is_interpolated(step: float) -> None:
    found = Timeline(STEPS, 800.0).at(step) @ basis(VALUES)
    np.testing.assert_allclose(found, weights_at(VALUES, STEPS.tolist(), step) - VALUES[0], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("index", range(6))
def test_a_place_on_a_snapshot_is_that_snapshot_alone(index: int) -> None:
    vector = Timeline(STEPS, 800.0).at(float(STEPS[index]))
    assert vector.tolist() == [1.0] * index + [0.0] * (7 - index)


@pytest.mark.parametrize("step", [99.999, -1.0, 450.001, 500.0, 1e9])
def test_a_place_outside_the_visible_history_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match=r"outside \[100.0, 450.0\]"):
        Timeline(STEPS, 450.0).at(step)


def test_what_an_origin_sees_ends_with_it() -> None:
    assert [Timeline(STEPS, origin).num_snapshots for origin in (100.0, 249.9, 250.0, 799.0, 800.0)] == [1, 2, 3, 5, 6]
    assert (Timeline(STEPS, 450.0).first, Timeline(STEPS, 450.0).length) == (100.0, 350.0)
    assert Timeline(STEPS, 800.0).before(450.0) == Timeline(STEPS, 450.0)


def test_its_places_are_the_snapshots_in_sight_and_the_origin() -> None:
    assert Timeline(STEPS, 400.0).places == [100, 200, 250, 400]
    assert Timeline(STEPS, 450.0).places == [100, 200, 250, 400, 450]
    assert Timeline(STEPS, 100.0).places == [100]


@pytest.mark.parametrize(
    ("first", "last", "shares"),  # of w(100), w(200), w(250), w(400), w(500), w(800)
    [
        (100, 200, [1 / 2, 1 / 2, 0, 0, 0, 0]),
        (200, 400, [0, 25 / 200, 100 / 200, 75 / 200, 0, 0]),  # half of each length beside a snapshot
        (600, 700, [0, 0, 0, 0, 1 / 2, 1 / 2]),  # inside one length: its middle
        (450, 550, [0, 0, 0, 1 / 8, 1 / 2 * 3 / 4 + 1 / 2 * 11 / 12, 1 / 2 * 1 / 12]),
    ],
)
def test_the_mean_over_a_window_is_taken_along_the_chords(first: float, last: float, shares: list[float]) -> None:
    found = Timeline(STEPS, 800.0).mean(first, last) @ basis(VALUES)
    np.testing.assert_allclose(found, shares @ VALUES - VALUES[0], rtol=0, atol=ROUNDING)


@given(ends=st.lists(st.integers(100, 800), min_size=2, max_size=2, unique=True).map(sorted))
def test_the_mean_over_a_window_is_the_mean_of_all_its_steps(ends: list[int]) -> None:
    """Of the middles between whole steps: no snapshot lies between two of those, so that the sum is exact."""
    middles = np.arange(ends[0], ends[1]) + 0.5
    expected = np.mean([weights_at(VALUES, STEPS.tolist(), middle) for middle in middles], axis=0) - VALUES[0]
    found = Timeline(STEPS, float(ends[1])).mean(*map(float, ends)) @ basis(VALUES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("first", "last", "points"),
    [
        (100, 800, [100, 200, 250, 400, 500, 800]),
        (200, 500, [200, 250, 400, 500]),
        (150, 450, [200, 250, 400, 450]),  # the end is interpolated, and counts
        (399.5, 500, [400, 500]),
        (401, 500, [400, 500]),  # one snapshot in the window: back to the one before
        (600, 800, [500, 800]),
        (410, 450, [400, 450]),  # none: the end, and back to the one before
        (100, 150, [100, 150]),
    ],
)
def test_the_slope_over_a_window_is_the_least_squares_slope_of_its_snapshots(
    first: float, last: float, points: list[float]
) -> None:
    found = Timeline(STEPS, 800.0).slope(first, last) @ basis(VALUES)
    np.testing.assert_allclose(found, _fitted_slope(points), rtol=0, atol=ROUNDING)


@given(ends=st.lists(st.floats(100, 800), min_size=2, max_size=2, unique=True).map(sorted))
def test_a_slope_sees_nothing_behind_the_end_of_its_window(ends: list[float]) -> None:
    """But for the next snapshot, towards which its end is interpolated."""
    first, last = ends
    vector = Timeline(STEPS, last).slope(first, last)
    following = int(np.searchsorted(STEPS, last))
    assert not vector[following:].any()
