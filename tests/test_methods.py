"""Each method against an oracle on whole vectors, and the exact cases."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from farcast_cli.engine.linear import LinearMap
from farcast_cli.errors import UsageError
from farcast_cli.forecast import lfd2
from farcast_cli.forecast.forecaster import Options, forecast
from farcast_cli.forecast.methods import (
    ACCELERATE_RIDGE,
    ACCELERATED,
    AVERAGED,
    LINE_FIT,
    MAX_AVERAGED,
    MAX_TREND,
    METHODS,
    NUM_FLOWS,
    RIDGE,
    averaging_window,
    find_method,
)
from tests.tiny import applied, assert_same_steps, make_task, step_of, straight, wander, weights_at

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import Scope
    from tests.tiny import Arrays

    Vector = NDArray[np.float64]

STEPS = tuple(range(100, 1000, 100))
UNEVEN = (0, 10, 200, 350, 360, 500, 800, 900, 1000)
SIZES = {"a": 40, "b": 5, "c": 120}
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size
SQUARED = 1e-7  # normal equations square the condition of the oracle's problem
TRAINED = 1e-5  # of the move: the precision of the reweighted fit


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_persistence_takes_no_step() -> None:
    for step in step_of("persistence", wander(7, num_snapshots=9, sizes=SIZES), STEPS, 200).values():
        assert not step.any()


def test_an_average_of_a_straight_path_is_of_two_snapshots_and_lies_halfway_between_them() -> None:
    """There is no noise that a longer one would take away."""
    arrays, speeds = straight(STEPS, SIZES)
    assert_same_steps(step_of("average", arrays, STEPS, 500), {key: -50 * speed for key, speed in speeds.items()}, ALGEBRA)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("horizon", [100, 400])
def test_lfd2_continues_a_path_along_a_power_of_time_exactly(power: float, horizon: int) -> None:
    """A path w_0 + D t^p moves from x to s as from s to s + h when s / x = (s + h) / s, which is how lfd2 is trained."""
    random = np.random.default_rng(9)
    times = np.linspace(0, 1, 41)[:, None] ** power
    starts, ways = random.normal(size=300), random.normal(size=300)
    arrays = {"w": starts + times * ways}
    found = step_of("lfd2", arrays, range(0, 4100, 100), horizon)
    expected = {"w": ways * ((1 + horizon / 4000) ** power - 1)}
    # between snapshots the path is read as a chord, which is off by 1/8 of the second difference at most
    assert_same_steps(found, expected, TRAINED + 0.03)


@pytest.mark.parametrize(("decay", "drive"), [(0.999, 0.0), (0.998, 0.001), (1.0005, -0.002)])
def test_lfd2_fits_affine_updates_exactly(decay: float, drive: float) -> None:
    """Proposition 1: where every update is w <- c w + d, one linear layer leads from x to s without error.

    The layer is read back from the step's coefficients: p_v on w_0, p_u + p_v on the increments, and the constant.
    """
    steps = tuple(range(0, 1100, 100))
    start = np.random.default_rng(10).normal(size=400)
    path = [start]
    for _ in range(1000):
        path.append(decay * path[-1] + drive)
    arrays = {"w": np.stack(path[::100])}
    task = make_task(arrays, steps, 250)  # x = 800, a snapshot
    (step,) = forecast(METHODS["lfd2"], task)
    along_weight, constant = step[-2], step[-1]
    along_drift = step[0] - along_weight
    fitted = along_drift * (path[800] - path[0]) + along_weight * path[800] + constant
    truth = path[1000] - path[800]
    assert np.abs(fitted - truth).mean() < TRAINED * np.abs(truth).mean()


# --- regressions -----------------------------------------------------------------------------------------------------


def _flows(weights: Callable[[float], Vector], first: float, end: float) -> Vector:
    points = [weights(first + (end - first) * i / NUM_FLOWS) for i in range(NUM_FLOWS + 1)]
    return np.stack([b - a for a, b in itertools.pairwise(points)], axis=1)


def _above_means(weights: Callable[[float], Vector], first: float, end: float) -> Vector:
    """The means as sums over a fine grid."""

    def mean(start: float) -> Vector:
        middles = np.linspace(start, end, 2001)[:-1] + (end - start) / 4000
        return np.asarray(np.mean([weights(float(middle)) for middle in middles], axis=0))

    return np.stack([weights(end) - mean(end - (end - first) / part) for part in (8, 4, 2)], axis=1)


def _ridge_oracle(arrays: Arrays, steps: tuple[int, ...], horizon: float, inputs_at: Callable[..., Vector]) -> Vector:
    """The regression on whole vectors, its ridge as extra rows: the step of all tensors taken as one."""
    first, last = float(steps[0]), float(steps[-1])
    origin = first + (last - first) / (1 + horizon / (last - first))
    whole = np.concatenate(list(arrays.values()), axis=1)

    def weights(step: float) -> Vector:
        return weights_at(whole, steps, step)

    inputs = inputs_at(weights, first, origin)
    count = inputs.shape[1]
    ridge = np.sqrt(RIDGE * np.square(inputs).sum() / count) * np.eye(count)
    goal = np.concatenate([weights(last) - weights(origin), np.zeros(count)])
    coefficients = np.linalg.lstsq(np.concatenate([inputs, ridge]), goal, rcond=None)[0]
    return np.asarray(inputs_at(weights, first, last) @ coefficients)


# a grid of 2000 misses a kink by half its width, in one of 2000 terms: up to 1e-6 of the move
REGRESSIONS = [("k5", _flows, SQUARED), ("window-means", _above_means, 1e-5)]


@pytest.mark.parametrize("horizon", [30, 250, 900])
@pytest.mark.parametrize("steps", [STEPS, UNEVEN])
@pytest.mark.parametrize(("name", "inputs_at", "tolerance"), REGRESSIONS)
def test_a_regression_is_the_ridge_regression_on_whole_vectors(
    name: str, inputs_at: Callable[..., Vector], tolerance: float, steps: tuple[int, ...], horizon: float
) -> None:
    arrays = wander(11, num_snapshots=9, sizes={"a": 20, "b": 5})
    found = step_of(name, arrays, steps, horizon, step_norm="free")
    expected = {key: _ridge_oracle({key: values}, steps, horizon, inputs_at) for key, values in arrays.items()}
    assert_same_steps(found, expected, tolerance)


@pytest.mark.parametrize(("name", "inputs_at", "tolerance"), REGRESSIONS)
def test_a_regression_in_global_scope_fits_all_tensors_as_one(
    name: str, inputs_at: Callable[..., Vector], tolerance: float
) -> None:
    arrays = wander(12, num_snapshots=9, sizes={"a": 20, "b": 5})
    found = step_of(name, arrays, STEPS, 250, step_norm="free", scope="global")
    first, second = np.split(_ridge_oracle(arrays, STEPS, 250, inputs_at), [20])
    assert_same_steps(found, {"a": first, "b": second}, tolerance)


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [50, 900])
@pytest.mark.parametrize("steps", [STEPS, UNEVEN])
def test_line_fit_is_the_slope_of_the_line_through_the_last_snapshots(steps: tuple[int, ...], horizon: float) -> None:
    arrays = wander(24, num_snapshots=9, sizes=SIZES)
    expected = {key: horizon * np.polyfit(steps[-LINE_FIT:], values[-LINE_FIT:], 1)[0] for key, values in arrays.items()}
    assert_same_steps(step_of("line-fit", arrays, steps, horizon), expected, ALGEBRA)


@pytest.mark.parametrize("horizon", [50, 900])
@pytest.mark.parametrize("steps", [STEPS, UNEVEN])
def test_rank_1_moves_on_along_the_first_singular_vector(steps: tuple[int, ...], horizon: float) -> None:
    arrays = wander(25, num_snapshots=9, sizes=SIZES)
    expected = {}
    for key, values in arrays.items():
        left, sizes, right = np.linalg.svd(values - values[0], full_matrices=False)
        projections = left[:, 0] * sizes[0]
        slope, start = np.polyfit(steps, projections, 1)
        expected[key] = (slope * (steps[-1] + horizon) + start - projections[-1]) * right[0]
    assert_same_steps(step_of("rank-1", arrays, steps, horizon), expected, SQUARED)


def test_rank_1_keeps_the_part_of_the_weights_that_is_across_its_direction() -> None:
    arrays = wander(26, num_snapshots=9, sizes={"w": 60})
    step = step_of("rank-1", arrays, STEPS, 300)["w"]
    direction = np.linalg.svd(arrays["w"] - arrays["w"][0], full_matrices=False)[2][0]
    assert np.linalg.norm(step - (step @ direction) * direction) < SQUARED * np.linalg.norm(step)


# --- drift and blend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "window"), [(100, 200), (200, 400), (400, 800), (900, 800)])
def test_drift_is_the_mean_slope_over_twice_the_horizon_and_over_half_of_that(horizon: int, window: int) -> None:
    arrays = wander(17, num_snapshots=9, sizes=SIZES)

    def slope(values: NDArray[np.float64], first: float) -> NDArray[np.float64]:
        inside = [index for index, step in enumerate(STEPS) if step >= first]
        return np.asarray(np.polyfit(np.array(STEPS)[inside], values[inside], 1)[0])

    expected = {
        key: horizon * (slope(values, 900 - window) + slope(values, 900 - window / 2)) / 2 for key, values in arrays.items()
    }
    assert_same_steps(step_of("drift", arrays, STEPS, horizon), expected, ALGEBRA)


@pytest.mark.parametrize("horizon", [50, 300, 1000])
def test_blend_is_the_mean_of_drift_and_of_k5_with_its_norm_matched(horizon: int) -> None:
    arrays = wander(18, num_snapshots=9, sizes=SIZES)
    drift, matched = step_of("drift", arrays, STEPS, horizon), step_of("k5", arrays, STEPS, horizon, step_norm="match")
    expected = {key: (drift[key] + matched[key]) / 2 for key in arrays}
    assert_same_steps(step_of("blend", arrays, STEPS, horizon), expected, ALGEBRA)


# --- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_snapshots", "count"), [(2, 1), (3, 1), (6, 3), (9, 4), (10, AVERAGED), (14, AVERAGED)])
@pytest.mark.parametrize("horizon", [50, 900])
def test_average_extrapolate_lies_on_the_line_through_two_consecutive_averages(
    num_snapshots: int, count: int, horizon: float
) -> None:
    steps = tuple(np.cumsum(np.random.default_rng(27).integers(10, 200, size=num_snapshots)).tolist())
    arrays = wander(27, num_snapshots=num_snapshots, sizes=SIZES)
    late, early = np.mean(steps[-count:]), np.mean(steps[-2 * count : -count])
    expected = {}
    for key, values in arrays.items():
        first, second = values[-2 * count : -count].mean(axis=0), values[-count:].mean(axis=0)
        expected[key] = second + (second - first) / (late - early) * (steps[-1] + horizon - late) - values[-1]
    assert_same_steps(step_of("average-extrapolate", arrays, steps, horizon), expected, ALGEBRA)


def _noisy(seed: int, noise: float, drift: float, *, num_snapshots: int = 60) -> Arrays:
    """Independent noise of a given size around a straight path of a given speed per snapshot, in two tensors."""
    random, times = np.random.default_rng(seed), np.arange(num_snapshots)[:, None]
    return {
        key: times * drift * random.normal(size=size) + noise * random.normal(size=(num_snapshots, size))
        for key, size in {"a": 300, "b": 50}.items()
    }


def _window_oracle(arrays: Arrays, steps: Sequence[int]) -> int:
    """Every window tried on raw arrays: the error of a mean of k snapshots, its noise four times and its lag once."""
    whole = np.concatenate(list(arrays.values()), axis=1)
    recent = whole[[step >= (steps[0] + steps[-1]) / 2 for step in steps]]
    recent = recent if len(recent) >= 3 else whole[-3:]
    numbers = np.arange(len(recent))
    slope, start = np.polyfit(numbers, recent, 1)
    noise = np.square(recent - start - np.outer(numbers, slope)).sum() / max(1, len(recent) - 2)
    errors = {k: 4 * noise / k + np.square(slope * (k - 1) / 2).sum() for k in range(2, min(20, len(steps)) + 1)}
    return min(errors, key=lambda k: errors[k])


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0, 10.0, 100.0])
@pytest.mark.parametrize("num_snapshots", [2, 4, 6, 13, 60])
def test_average_is_the_mean_of_as_many_snapshots_as_the_evidence_favours(num_snapshots: int, noise: float) -> None:
    steps = tuple(range(100, 100 * num_snapshots + 1, 100))
    arrays = _noisy(30, noise, 1.0, num_snapshots=num_snapshots)
    count = _window_oracle(arrays, steps)
    assert averaging_window(make_task(arrays, steps, 0)) == count
    expected = {key: values[-count:].mean(axis=0) - values[-1] for key, values in arrays.items()}
    assert_same_steps(step_of("average", arrays, steps, 0), expected, ALGEBRA)


def test_an_averages_window_grows_with_the_noise_and_shrinks_with_the_drift_between_2_and_20() -> None:
    def window(noise: float, drift: float) -> int:
        return averaging_window(make_task(_noisy(31, noise, drift), tuple(range(0, 6000, 100)), 0))

    by_noise = [window(noise, 1.0) for noise in (0.0, 1.0, 4.0, 16.0, 1000.0)]
    by_drift = [window(4.0, drift) for drift in (0.0, 0.5, 1.0, 4.0, 1000.0)]
    assert by_noise == sorted(by_noise)
    assert by_drift == sorted(by_drift, reverse=True)
    assert (by_noise[0], by_noise[-1], by_drift[0], by_drift[-1]) == (2, MAX_AVERAGED, MAX_AVERAGED, 2)
    assert len(set(by_noise)) >= 4


def test_an_averages_window_does_not_depend_on_the_horizon_or_on_the_scale_of_the_weights() -> None:
    arrays, steps = _noisy(32, 4.0, 1.0), tuple(range(0, 6000, 100))
    scaled = {key: 1000 * values for key, values in arrays.items()}
    windows = {averaging_window(make_task(one, steps, horizon)) for one in (arrays, scaled) for horizon in (0, 50, 5000)}
    assert len(windows) == 1
    assert 2 < windows.pop() < MAX_AVERAGED


@pytest.mark.parametrize("horizon", [0, 50, 900])
@pytest.mark.parametrize(
    ("steps", "num_recent"),
    [
        (STEPS, 5),
        (UNEVEN, 4),
        ((0, 100), 2),
        ((0, 100, 200), 3),
        ((0, 10, 20, 1000), 3),
        (tuple(range(0, 4700, 100)), MAX_TREND),
    ],
)
def test_trend_is_the_end_of_the_line_through_the_recent_half(steps: tuple[int, ...], num_recent: int, horizon: int) -> None:
    """Three snapshots at least, where there are; with a horizon of 0 the line's own value at the last step."""
    arrays = wander(33, num_snapshots=len(steps), sizes=SIZES, roughness=5)
    expected = {}
    for key, values in arrays.items():
        slope, start = np.polyfit(steps[-num_recent:], values[-num_recent:], 1)
        expected[key] = slope * (steps[-1] + horizon) + start - values[-1]
    if len(steps) == 2 and not horizon:  # the line ends at the last snapshot
        assert all(np.abs(step).max() < ALGEBRA for step in step_of("trend", arrays, steps, horizon).values())
    else:
        assert_same_steps(step_of("trend", arrays, steps, horizon), expected, SQUARED)


@pytest.mark.parametrize("num_snapshots", [49, 60, 97, 400])
def test_trend_goes_through_24_snapshots_of_a_longer_half_evenly_spread_and_its_ends_among_them(num_snapshots: int) -> None:
    steps = tuple(range(0, 10 * num_snapshots, 10))
    arrays = wander(34, num_snapshots=num_snapshots, sizes=SIZES, roughness=5)
    recent = [index for index, step in enumerate(steps) if step >= steps[-1] / 2]
    chosen = [recent[round(share)] for share in np.linspace(0, len(recent) - 1, MAX_TREND)]
    assert (chosen[0], chosen[-1]) == (recent[0], num_snapshots - 1)
    assert len(set(chosen)) == MAX_TREND
    expected = {}
    for key, values in arrays.items():
        slope, start = np.polyfit(np.array(steps)[chosen], values[chosen], 1)
        expected[key] = slope * (steps[-1] + 200) + start - values[-1]
    assert_same_steps(step_of("trend", arrays, steps, 200), expected, SQUARED)
    used = LinearMap.from_updates([forecast(METHODS["trend"], make_task(arrays, steps, 200))], num_snapshots - 1).used
    assert set(used) <= set(chosen)


def test_a_trend_without_a_horizon_lies_nearer_to_the_path_under_the_noise_than_the_last_snapshot() -> None:
    """And than an average, which is behind."""
    random, steps = np.random.default_rng(35), tuple(range(0, 4000, 100))
    path = np.arange(40)[:, None] * random.normal(size=500)
    arrays = {"w": path + 5 * random.normal(size=path.shape)}
    errors = {
        name: np.linalg.norm(arrays["w"][-1] + step_of(name, arrays, steps, 0)["w"] - path[-1])
        for name in ("persistence", "trend", "average")
    }
    assert errors["trend"] < 0.6 * errors["persistence"]
    assert errors["trend"] < errors["average"]


def _acceleration_oracle(values: Vector, steps: tuple[int, ...]) -> Vector:
    """The constrained least-squares problem by its Lagrange equations, on whole vectors (P, N)."""
    count = min(len(steps) - 1, ACCELERATED)
    points = np.linspace(steps[-count - 1], steps[-1], count + 1)
    weights = np.stack([weights_at(values, steps, float(point)) for point in points])
    moves = np.diff(weights, axis=0)
    products = moves @ moves.T
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = 2 * (products / np.linalg.svd(products)[1][0] + ACCELERATE_RIDGE * np.eye(count))
    system[count, count] = 0
    shares = np.linalg.solve(system, np.eye(count + 1)[count])[:count]
    return np.asarray(shares @ weights[1:] - values[-1])


@pytest.mark.parametrize("steps", [(0, 100), STEPS[:4], STEPS, UNEVEN, tuple(range(0, 1500, 100))])
def test_accelerate_solves_the_constrained_problem_on_whole_vectors(steps: tuple[int, ...]) -> None:
    arrays = wander(28, num_snapshots=len(steps), sizes=SIZES)
    whole = _acceleration_oracle(np.concatenate(list(arrays.values()), axis=1), steps)
    together = dict(zip(arrays, np.split(whole, np.cumsum(list(SIZES.values()))[:-1]), strict=True))
    each = {key: _acceleration_oracle(values, steps) for key, values in arrays.items()}
    for horizon in (10, 700):  # of no consequence
        if len(steps) == 2:  # one move: its end is all there is
            assert not any(np.abs(step).max() > ALGEBRA for step in step_of("accelerate", arrays, steps, horizon).values())
        else:
            assert_same_steps(step_of("accelerate", arrays, steps, horizon), together, SQUARED)
            assert_same_steps(step_of("accelerate", arrays, steps, horizon, scope="tensor"), each, SQUARED)


def test_accelerate_finds_the_point_to_which_a_linear_iteration_converges() -> None:
    """Three modes, more moves than modes; all but the ridge's share, the root of 1e-8."""
    random = np.random.default_rng(29)
    goal, modes = random.normal(size=80), random.normal(size=(3, 80))
    path = goal + np.array([0.9, 0.7, -0.4]) ** np.arange(9)[:, None] @ modes
    arrays = {"a": path[:, :50], "b": path[:, 50:]}
    found = step_of("accelerate", arrays, STEPS, 100)
    assert_same_steps(found, {key: value - arrays[key][-1] for key, value in (("a", goal[:50]), ("b", goal[50:]))}, 1e-2)


# --- lfd2 ------------------------------------------------------------------------------------------------------------


def _two_speeds() -> Arrays:
    """One tensor slows down, the other speeds up: no single layer suits both."""
    random = np.random.default_rng(21)
    times = np.linspace(0, 1, 21)[:, None]
    return {
        key: random.normal(size=200) + times**power * random.normal(size=200)
        for key, power in {"slow": 0.5, "fast": 2.0}.items()
    }


def test_lfd2_is_one_layer_for_all_tensors_by_default_and_one_for_each_if_asked() -> None:
    arrays = _two_speeds()
    steps = tuple(range(0, 2100, 100))
    task = make_task(arrays, steps, 500)
    shared = forecast(METHODS["lfd2"], task)
    np.testing.assert_array_equal(shared[0], shared[1])
    each = replace(task, options=Options(scope="tensor"))
    own = applied(forecast(METHODS["lfd2"], each), arrays)
    for key, power in {"slow": 0.5, "fast": 2.0}.items():
        ways = arrays[key][-1] - arrays[key][0]
        truth = ways * (1.25**power - 1)
        error = np.linalg.norm(own[key] - truth) / np.linalg.norm(truth)
        assert error < 0.03  # trained, and read between snapshots along chords
        assert error < 0.2 * np.linalg.norm(applied(shared, arrays)[key] - truth) / np.linalg.norm(truth)


def test_lfd2s_regulariser_shortens_steps_that_would_outgrow_the_one_before() -> None:
    """On a path that speeds up steeply; and a larger weight shortens them more."""
    random = np.random.default_rng(21)
    arrays = {"w": random.normal(size=200) + np.linspace(0, 1, 21)[:, None] ** 8 * random.normal(size=200)}
    lengths = [
        float(np.linalg.norm(step_of("lfd2", arrays, range(0, 2100, 100), 1000, grad_weight=weight)["w"]))
        for weight in (0.0, 1.0, 10.0)
    ]
    assert lengths[1] < 0.97 * lengths[0]
    assert lengths[2] < 0.5 * lengths[1]


def test_lfd2s_regulariser_leaves_a_path_that_slows_down_as_it_is() -> None:
    arrays = {"slow": _two_speeds()["slow"]}
    plain, weighted = (step_of("lfd2", arrays, range(0, 2100, 100), 1000, grad_weight=weight)["slow"] for weight in (0.0, 1.0))
    assert np.linalg.norm(weighted - plain) < 0.02 * np.linalg.norm(plain)  # the hinge is 0 at the end, not on the way


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("seed", range(5))
def test_lfd2s_layer_has_the_least_absolute_error_that_any_layer_has(seed: int, scope: Scope) -> None:
    """The exact minimum is that of a linear programme: min sum_i share_i (p_i + q_i) where X a + p - q = y and p, q >= 0."""
    random = np.random.default_rng(seed)
    arrays = {
        key: random.normal(size=size)
        + np.linspace(0, 1, 9)[:, None] ** random.uniform(0.3, 2) * random.standard_t(2, size=size)
        + 0.1 * random.normal(size=(9, size))
        for key, size in SIZES.items()
    }
    task = make_task(arrays, STEPS, 200)
    rows = lfd2.training_rows(task.sample, task.timeline, task.training_origin, per_tensor=scope == "tensor")
    found = lfd2.least_absolute(rows)
    for fit in range(len(rows.starts)):
        inside = rows.group == fit
        inputs, goal, share = rows.inputs[:, inside].T, rows.targets[-1, inside], rows.share[inside]
        slack = np.eye(len(goal))
        exact = linprog(
            np.concatenate([np.zeros(3), share, share]),
            A_eq=np.hstack([inputs, slack, -slack]),
            b_eq=goal,
            bounds=[(None, None)] * 3 + [(0, None)] * (2 * len(goal)),
        )
        loss = share @ np.abs(goal - inputs @ (found[:, fit] * rows.input_size[:, fit] / rows.target_size[fit]))
        assert exact.fun <= loss * (1 + 1e-12)
        assert loss <= exact.fun + (1e-4 if len(goal) >= 40 else 1e-3)  # of the mean target


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_lfd2_with_its_regulariser_is_trained_as_torchs_adam_would(scope: Scope) -> None:
    """The gradient by hand against autograd's, step by step."""
    task = make_task(wander(23, num_snapshots=9, sizes=SIZES), STEPS, 200)
    rows = lfd2.training_rows(task.sample, task.timeline, task.training_origin, per_tensor=scope == "tensor")
    inputs, targets, share, group, last = (
        torch.from_numpy(a) for a in (rows.inputs, rows.targets, rows.share, rows.group, rows.last_move)
    )
    layers = torch.zeros(len(targets), len(inputs), len(rows.starts), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([layers], lr=lfd2.LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lfd2.NUM_STEPS)

    def mean(each: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(len(each), len(rows.starts), dtype=torch.float64)
        return zeros.index_add(1, group, each.abs() * share)

    for _ in range(lfd2.NUM_STEPS):
        predicted = (inputs * layers[..., group]).sum(dim=1)  # (J, M)
        sizes = mean(torch.diff(predicted, dim=0, prepend=torch.zeros_like(predicted[:1])))
        growth = torch.diff(sizes, dim=0, prepend=last[None]).clamp_min(0)
        loss = mean(predicted - targets).mean(dim=0).sum() + 1.5 * growth.mean(dim=0).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    expected = rows.in_weights(layers[-1].detach().numpy())
    np.testing.assert_allclose(lfd2.train(rows, 1.5), expected, rtol=1e-6, atol=1e-9)


def test_lfd2_trains_alike_each_time() -> None:
    arrays = wander(22, num_snapshots=9, sizes=SIZES)
    assert_same_steps(step_of("lfd2", arrays, STEPS, 200), step_of("lfd2", arrays, STEPS, 200), 0)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_lfd2s_loss_in_the_history_is_below_that_of_persistence(seed: int) -> None:
    arrays = wander(seed, num_snapshots=9, sizes={"w": 60})
    task = make_task(arrays, STEPS, 200)
    (step,) = forecast(METHODS["lfd2"], task)
    values, origin = arrays["w"], 740.0
    at_origin = weights_at(values, STEPS, origin)
    fitted = (step[0] - step[-2]) * (at_origin - values[0]) + step[-2] * at_origin + step[-1]
    truth = values[-1] - at_origin
    assert np.abs(fitted - truth).mean() < np.abs(truth).mean()


# --- choices ---------------------------------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=f"--method k7: expected one of {', '.join(METHODS)}"):
        find_method("k7")


def test_the_methods_are_known_by_these_names() -> None:
    assert set(METHODS) == {
        *("blend", "drift", "line", "line-fit", "rank-1", "k5", "window-means", "lfd2"),
        *("average", "average-extrapolate", "accelerate", "trend", "persistence"),
    }
    assert {name for name, method in METHODS.items() if method.averages} == {"average", "accelerate", "trend"}
    assert {name for name, method in METHODS.items() if method.extrapolates} == {"trend"}
