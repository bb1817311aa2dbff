"""One contract for all methods, and each method against an oracle on whole vectors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farcast_cli.engine import LinearMap
from farcast_cli.errors import UsageError
from farcast_cli.forecaster import (
    MAX_CONTEXT,
    MAX_MATCH,
    METHODS,
    NUM_FLOWS,
    RIDGE,
    Options,
    StepNorm,
    find_method,
    forecast,
    plain_step,
    set_step_norm,
)
from tests.tiny import applied, make_task, torch_settings_kept, wander, weights_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from farcast_cli.forecaster import Scope
    from tests.tiny import Arrays

STEPS = tuple(range(100, 1000, 100))
SIZES = {"a": 40, "b": 5, "c": 120}
LINEAR = [name for name in METHODS if name != "lfd2"]  # methods of increments alone; lfd2 has a constant and a gain too
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size
TRAINED = 2e-3  # of the move; lfd2 is trained by 300 steps of Adam


@pytest.fixture(autouse=True, scope="module")
def _torch_settings() -> Iterator[None]:
    with torch_settings_kept():
        yield


def _step(name: str, arrays: Arrays, horizon: float, *, steps: tuple[int, ...] = STEPS, **options: object) -> Arrays:
    task = make_task(arrays, steps, horizon, options=replace(Options(), **options))  # type: ignore[arg-type]
    return applied(forecast(METHODS[name], task), arrays)


def _assert_same_steps(found: Arrays, expected: Arrays, tolerance: float) -> None:
    """Equal to a share of the largest expected step."""
    size = max(np.abs(step).max() for step in expected.values())
    for name, step in expected.items():
        np.testing.assert_allclose(found[name], step, rtol=0, atol=tolerance * size, err_msg=name)


# --- the contract of all methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("origin", "num_seen"), [(900.0, 9), (1300.0, 13), (850.0, 9), (1901.0, 20)])
@pytest.mark.parametrize("name", METHODS)
def test_changing_the_future_changes_no_coefficient(name: str, origin: float, num_seen: int) -> None:
    """To the last bit. An origin between two snapshots is interpolated towards the next one; nothing after it counts."""
    steps = tuple(range(100, 2500, 100))
    arrays = wander(1, num_snapshots=24, sizes=SIZES)
    other = {key: values.copy() for key, values in arrays.items()}
    for index, values in enumerate(other.values()):
        values[num_seen:] = 1000 * np.random.default_rng(index).normal(size=values[num_seen:].shape)
    for horizon in (50, 300):
        first = forecast(METHODS[name], make_task(arrays, steps, horizon, origin=origin))
        second = forecast(METHODS[name], make_task(other, steps, horizon, origin=origin))
        np.testing.assert_array_equal(first, second)
        assert not first[:, num_seen - 1 : -2].any()


@pytest.mark.parametrize("norm", ["match", "match-plain", "clip", "free"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_tensor_that_never_moved_gets_a_step_of_exactly_zero(name: str, norm: StepNorm) -> None:
    """For lfd2, whose constant moves everything, the engine holds such tensors still: see test_engine.py."""
    arrays = wander(2, num_snapshots=9, sizes=SIZES) | {"still": np.ones((9, 1)) * np.random.default_rng(2).normal(size=7)}
    steps = _step(name, arrays, 200, step_norm=norm)
    assert not steps["still"].any()
    assert all(np.isfinite(step).all() for step in steps.values())


@pytest.mark.parametrize("factor", [4.0, -0.125, 3.0])
@pytest.mark.parametrize("name", METHODS)
def test_scaling_all_weights_scales_the_step(name: str, factor: float) -> None:
    """For lfd2 to the precision of its training, which a rescaled start rounds otherwise."""
    arrays = wander(3, num_snapshots=9, sizes=SIZES)
    if name == "persistence":
        return
    expected = {key: factor * step for key, step in _step(name, arrays, 200).items()}
    found = _step(name, {key: factor * values for key, values in arrays.items()}, 200)
    _assert_same_steps(found, expected, TRAINED if name == "lfd2" else ALGEBRA)


@pytest.mark.parametrize("scope", ["auto", "tensor", "global"])
@pytest.mark.parametrize("name", METHODS)
def test_permuting_the_tensors_permutes_the_steps(name: str, scope: Scope) -> None:
    arrays = wander(4, num_snapshots=9, sizes=SIZES)
    found = _step(name, dict(reversed(list(arrays.items()))), 200, scope=scope)
    expected = _step(name, arrays, 200, scope=scope)
    assert list(found) == list(expected)[::-1]
    if name != "persistence":
        _assert_same_steps(found, expected, TRAINED if name == "lfd2" else ALGEBRA)


@pytest.mark.parametrize("name", METHODS)
def test_twice_the_scale_is_twice_the_step(name: str) -> None:
    arrays = wander(5, num_snapshots=9, sizes=SIZES)
    once, twice = _step(name, arrays, 200), _step(name, arrays, 200, scale=2.0)
    for key, step in once.items():
        np.testing.assert_array_equal(twice[key], 2 * step)


@pytest.mark.parametrize("name", METHODS)
def test_two_snapshots_are_enough_for_a_finite_step(name: str) -> None:
    arrays = wander(6, num_snapshots=2, sizes=SIZES)
    for step in _step(name, arrays, 50, steps=(0, 100)).values():
        assert np.isfinite(step).all()


# --- exact cases -----------------------------------------------------------------------------------------------------


def test_persistence_takes_no_step() -> None:
    for step in _step("persistence", wander(7, num_snapshots=9, sizes=SIZES), 200).values():
        assert not step.any()


def _straight(steps: tuple[int, ...]) -> tuple[Arrays, Arrays]:
    """Straight paths and their velocities per step."""
    random = np.random.default_rng(8)
    starts, speeds = ({key: random.normal(size=size) for key, size in SIZES.items()} for _ in range(2))
    return {key: starts[key] + np.array(steps)[:, None] * speeds[key] / 1000 for key in SIZES}, {
        key: speeds[key] / 1000 for key in SIZES
    }


@pytest.mark.parametrize("steps", [STEPS, (0, 10, 200, 350, 360, 1000), tuple(range(0, 3000, 100))])
@pytest.mark.parametrize("horizon", [10, 300, 1200])
@pytest.mark.parametrize(
    ("name", "norm"), [("line", None), ("drift", None), ("blend", None), ("k5", "match"), ("line", "match")]
)
def test_a_straight_path_is_continued_exactly(name: str, norm: StepNorm | None, horizon: int, steps: tuple[int, ...]) -> None:
    """Matching undoes the ridge's shrinkage, for a straight path to rounding."""
    arrays, speeds = _straight(steps)
    found = _step(name, arrays, horizon, steps=steps, step_norm=norm)
    _assert_same_steps(found, {key: speed * horizon for key, speed in speeds.items()}, ALGEBRA)


def test_an_average_of_a_straight_path_lies_two_snapshots_back() -> None:
    arrays, speeds = _straight(STEPS)
    _assert_same_steps(_step("average", arrays, 500), {key: -200 * speed for key, speed in speeds.items()}, ALGEBRA)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("horizon", [100, 400])
def test_lfd2_continues_a_path_along_a_power_of_time_exactly(power: float, horizon: int) -> None:
    """A path w_0 + D t^p moves from x to s as from s to s + h when s / x = (s + h) / s, which is how lfd2 is trained."""
    random = np.random.default_rng(9)
    times = np.linspace(0, 1, 41)[:, None] ** power
    starts, ways = random.normal(size=300), random.normal(size=300)
    arrays = {"w": starts + times * ways}
    found = _step("lfd2", arrays, horizon, steps=tuple(range(0, 4100, 100)))
    expected = {"w": ways * ((1 + horizon / 4000) ** power - 1)}
    # between snapshots the path is read as a chord, which is off by 1/8 of the second difference at most
    _assert_same_steps(found, expected, TRAINED + 0.03)


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


# --- k5 --------------------------------------------------------------------------------------------------------------


def _k5_oracle(arrays: Arrays, steps: tuple[int, ...], horizon: float) -> NDArray[np.float64]:
    """The regression on whole vectors, its ridge as extra rows: the step of all tensors taken as one."""
    first, last = float(steps[0]), float(steps[-1])
    origin = first + (last - first) / (1 + horizon / (last - first))

    def weights(step: float) -> NDArray[np.float64]:
        return np.concatenate([weights_at(values, steps, step) for values in arrays.values()])

    def flows(end: float) -> NDArray[np.float64]:
        points = [weights(first + (end - first) * i / NUM_FLOWS) for i in range(NUM_FLOWS + 1)]
        return np.stack([b - a for a, b in itertools.pairwise(points)], axis=1)

    inputs = flows(origin)
    ridge = np.sqrt(RIDGE * np.square(inputs).sum() / NUM_FLOWS) * np.eye(NUM_FLOWS)
    goal = np.concatenate([weights(last) - weights(origin), np.zeros(NUM_FLOWS)])
    coefficients = np.linalg.lstsq(np.concatenate([inputs, ridge]), goal, rcond=None)[0]
    return np.asarray(flows(last) @ coefficients)


@pytest.mark.parametrize("horizon", [30, 250, 900])
@pytest.mark.parametrize("steps", [STEPS, (0, 10, 200, 350, 360, 500, 800, 900, 1000)])
def test_k5_is_the_ridge_regression_on_whole_vectors(steps: tuple[int, ...], horizon: float) -> None:
    arrays = wander(11, num_snapshots=9, sizes=SIZES)
    found = _step("k5", arrays, horizon, steps=steps, step_norm="free")
    expected = {key: _k5_oracle({key: values}, steps, horizon) for key, values in arrays.items()}
    _assert_same_steps(found, expected, 1e-7)  # normal equations square the condition of the oracle's problem


def test_k5_in_global_scope_fits_all_tensors_as_one() -> None:
    arrays = wander(12, num_snapshots=9, sizes=SIZES)
    found = _step("k5", arrays, 250, step_norm="free", scope="global")
    together = _k5_oracle(arrays, STEPS, 250)
    expected = dict(zip(arrays, np.split(together, np.cumsum(list(SIZES.values()))[:-1]), strict=True))
    _assert_same_steps(found, expected, 1e-7)


# --- norms -----------------------------------------------------------------------------------------------------------


def _norms(arrays: Arrays) -> NDArray[np.float64]:
    return np.array([np.linalg.norm(values) for values in arrays.values()])


@pytest.mark.parametrize("horizon", [50, 200, 800])
def test_matched_steps_are_as_long_as_the_matched_move(horizon: float) -> None:
    arrays = wander(13, num_snapshots=9, sizes=SIZES)
    origin = 100 + 800 / (1 + horizon / 800)
    moves = _norms({key: values[-1] - weights_at(values, STEPS, origin) for key, values in arrays.items()})
    np.testing.assert_allclose(_norms(_step("k5", arrays, horizon, step_norm="match-plain")), moves, rtol=ALGEBRA)
    stretched = moves * (1 + horizon / 800)
    np.testing.assert_allclose(_norms(_step("k5", arrays, horizon, step_norm="match")), stretched, rtol=ALGEBRA)


@settings(deadline=None)  # a busy machine is no failure
@given(size=st.floats(1e-6, 1e6), norm=st.sampled_from(["match", "match-plain", "clip", "free"]))
def test_a_steps_norm_is_set_by_the_formula_whatever_its_size(size: float, norm: StepNorm) -> None:
    arrays = wander(14, num_snapshots=9, sizes={"w": 50})
    task = make_task(arrays, STEPS, 200)
    plain = size * forecast(METHODS["line"], task)
    length = float(np.linalg.norm(applied(plain, arrays)["w"]))
    move = float(np.linalg.norm(arrays["w"][-1] - weights_at(arrays["w"], STEPS, 740.0)))  # x = 100 + 800 / 1.25
    factor = {
        "match": min(move * 1.25 / length, MAX_MATCH),
        "match-plain": min(move / length, MAX_MATCH),
        "clip": min(move / length, 1.0),
        "free": 1.0,
    }[norm]
    np.testing.assert_allclose(set_step_norm(plain, task, norm), plain * factor, rtol=ALGEBRA)


def test_matching_grows_a_step_three_times_at_most_and_clipping_never() -> None:
    arrays = wander(15, num_snapshots=9, sizes=SIZES)
    task = make_task(arrays, STEPS, 200)
    tiny = 1e-9 * forecast(METHODS["line"], task)
    np.testing.assert_allclose(set_step_norm(tiny, task, "match"), 3 * tiny, rtol=ALGEBRA)
    np.testing.assert_array_equal(set_step_norm(tiny, task, "clip"), tiny)


def test_a_method_has_its_own_norm_and_the_user_may_choose_another() -> None:
    arrays = wander(16, num_snapshots=9, sizes=SIZES)
    _assert_same_steps(_step("k5", arrays, 200), _step("k5", arrays, 200, step_norm="clip"), 0)
    _assert_same_steps(_step("line", arrays, 200), _step("line", arrays, 200, step_norm="free"), 0)


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
    _assert_same_steps(_step("drift", arrays, horizon), expected, ALGEBRA)


@pytest.mark.parametrize("horizon", [50, 300, 1000])
def test_blend_is_the_mean_of_drift_and_of_k5_with_its_norm_matched(horizon: int) -> None:
    arrays = wander(18, num_snapshots=9, sizes=SIZES)
    drift, matched = _step("drift", arrays, horizon), _step("k5", arrays, horizon, step_norm="match")
    expected = {key: (drift[key] + matched[key]) / 2 for key in arrays}
    _assert_same_steps(_step("blend", arrays, horizon), expected, ALGEBRA)


# --- how many snapshots are read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blend", "drift"])
def test_a_slope_over_a_long_history_reads_ten_snapshots_spread_over_it(name: str) -> None:
    steps = tuple(range(100, 4200, 100))
    arrays = wander(19, num_snapshots=41, sizes=SIZES)
    step = forecast(METHODS[name], make_task(arrays, steps, 2000))
    used = LinearMap.from_steps([step], 40).used
    assert len(used) <= MAX_CONTEXT
    keep = np.linspace(0, 40, MAX_CONTEXT).round().astype(int)
    assert set(used) <= set(keep.tolist())
    thinned = {key: values[keep] for key, values in arrays.items()}
    expected = _step(name, thinned, 2000, steps=tuple(100 + 100 * int(index) for index in keep))
    _assert_same_steps(applied(step, arrays), expected, ALGEBRA)


@pytest.mark.parametrize("name", ["blend", "drift"])
def test_a_thinned_slope_from_between_two_snapshots_still_ends_at_the_origin(name: str) -> None:
    """Of a straight path, which any thinning continues exactly."""
    steps = tuple(range(0, 3000, 100))
    arrays, speeds = _straight(steps)
    step = plain_step(METHODS[name], make_task(arrays, steps, 700, origin=2345.0))
    _assert_same_steps(applied(step, arrays), {key: 700 * speed for key, speed in speeds.items()}, ALGEBRA)
    assert not step[:, 24:-2].any()


@pytest.mark.parametrize(("name", "most"), [("persistence", 1), ("line", 3), ("lfd2", 2), ("average", 5), ("k5", 8)])
def test_a_method_reads_few_snapshots_of_a_long_history(name: str, most: int) -> None:
    arrays = wander(20, num_snapshots=42, sizes={"w": 30})
    step = forecast(METHODS[name], make_task(arrays, tuple(range(100, 4300, 100)), 900))
    assert len(LinearMap.from_steps([step], 41).used) <= most


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
        float(np.linalg.norm(_step("lfd2", arrays, 1000, steps=tuple(range(0, 2100, 100)), grad_weight=weight)["w"]))
        for weight in (0.0, 1.0, 10.0)
    ]
    assert lengths[1] < 0.97 * lengths[0]
    assert lengths[2] < 0.5 * lengths[1]


def test_lfd2s_regulariser_leaves_a_path_that_slows_down_as_it_is() -> None:
    arrays = {"slow": _two_speeds()["slow"]}
    plain, weighted = (
        _step("lfd2", arrays, 1000, steps=tuple(range(0, 2100, 100)), grad_weight=weight)["slow"] for weight in (0.0, 1.0)
    )
    assert np.linalg.norm(weighted - plain) < 0.02 * np.linalg.norm(plain)  # the hinge is 0 at the end, not on the way


def test_lfd2_trains_alike_each_time() -> None:
    arrays = wander(22, num_snapshots=9, sizes=SIZES)
    _assert_same_steps(_step("lfd2", arrays, 200), _step("lfd2", arrays, 200), 0)


@settings(max_examples=10, deadline=None)
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
    with pytest.raises(UsageError, match="--method k7: expected one of blend, k5, drift, lfd2, line, average, persistence"):
        find_method("k7")
