"""One contract for all methods, how a step's norm is set, and how many snapshots are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farcast_cli.engine.linear import LinearMap
from farcast_cli.forecast.forecaster import MAX_MATCH, forecast, plain_step, set_step_norm
from farcast_cli.forecast.methods import METHODS
from tests.tiny import applied, assert_same_steps, make_task, step_of, straight, wander, weights_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.choices import Scope, StepNorm
    from tests.tiny import Arrays

STEPS = tuple(range(100, 1000, 100))
SIZES = {"a": 40, "b": 5, "c": 120}
MOVING = [name for name in METHODS if name != "persistence"]
LINEAR = [name for name in METHODS if name != "lfd2"]  # methods of increments alone; lfd2 has a constant and a gain too
THINNED = [name for name, method in METHODS.items() if method.max_context]
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size
TRAINED = 1e-5  # of the move: the precision of the reweighted fit


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


@pytest.mark.parametrize(("num_snapshots", "origin"), [(6, 600.0), (6, 550.0), (9, 900.0), (25, 2431.5), (40, 4000.0)])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_a_finite_coefficient_for_every_tensor_and_basis_vector(name: str, num_snapshots: int, origin: float) -> None:
    steps = tuple(range(100, 100 * num_snapshots + 1, 100))
    arrays = wander(0, num_snapshots=num_snapshots, sizes=SIZES)
    for horizon in (0.0, 1.0, 70.5, 3000.0):
        task = make_task(arrays, steps, horizon, origin=origin)
        for one in (task, task.backtest()):
            step = forecast(METHODS[name], one)
            assert step.shape == (len(SIZES), num_snapshots + 1)
            assert np.isfinite(step).all()


@pytest.mark.parametrize("name", METHODS)
def test_an_origin_between_two_snapshots_is_as_if_one_had_been_saved_there(name: str) -> None:
    """The weights halfway along the chord."""
    arrays = wander(23, num_snapshots=9, sizes=SIZES)
    saved = {key: np.stack([*values[:8], (values[7] + values[8]) / 2]) for key, values in arrays.items()}
    found = applied(forecast(METHODS[name], make_task(arrays, STEPS, 200, origin=850.0)), arrays)
    expected = step_of(name, saved, (*STEPS[:8], 850), 200)
    if name == "persistence":
        assert not any(step.any() for step in [*found.values(), *expected.values()])
        return
    assert_same_steps(found, expected, TRAINED if name == "lfd2" else ALGEBRA)


@pytest.mark.parametrize("norm", ["match", "match-plain", "clip", "free"])
@pytest.mark.parametrize("name", LINEAR)
def test_a_tensor_that_never_moved_gets_a_step_of_exactly_zero(name: str, norm: StepNorm) -> None:
    """For lfd2, whose constant moves everything, the engine holds such tensors still: see test_engine.py."""
    arrays = wander(2, num_snapshots=9, sizes=SIZES) | {"still": np.ones((9, 1)) * np.random.default_rng(2).normal(size=7)}
    steps = step_of(name, arrays, STEPS, 200, step_norm=norm)
    assert not steps["still"].any()
    assert all(np.isfinite(step).all() for step in steps.values())


@pytest.mark.parametrize("factor", [4.0, -0.125, 3.0])
@pytest.mark.parametrize("name", MOVING)
def test_scaling_all_weights_scales_the_step(name: str, factor: float) -> None:
    """For lfd2 to the precision of its training, which a rescaled start rounds otherwise."""
    arrays = wander(3, num_snapshots=9, sizes=SIZES)
    expected = {key: factor * step for key, step in step_of(name, arrays, STEPS, 200).items()}
    found = step_of(name, {key: factor * values for key, values in arrays.items()}, STEPS, 200)
    assert_same_steps(found, expected, TRAINED if name == "lfd2" else ALGEBRA)


@pytest.mark.parametrize("scope", ["auto", "tensor", "global"])
@pytest.mark.parametrize("name", METHODS)
def test_permuting_the_tensors_permutes_the_steps(name: str, scope: Scope) -> None:
    arrays = wander(4, num_snapshots=9, sizes=SIZES)
    found = step_of(name, dict(reversed(list(arrays.items()))), STEPS, 200, scope=scope)
    expected = step_of(name, arrays, STEPS, 200, scope=scope)
    assert list(found) == list(expected)[::-1]
    if name != "persistence":
        assert_same_steps(found, expected, TRAINED if name == "lfd2" else ALGEBRA)


@pytest.mark.parametrize("steps", [STEPS, (0, 10, 200, 350, 360, 1000), tuple(range(0, 3000, 100))])
@pytest.mark.parametrize("horizon", [10, 300, 1200])
@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("line", None),
        ("line-fit", None),
        ("drift", None),
        ("blend", None),
        ("rank-1", None),
        ("average-extrapolate", None),
        ("trend", None),
        ("line", "match"),
        ("k5", "match"),
        ("window-means", "match"),
    ],
)
def test_a_straight_path_is_continued_exactly(name: str, norm: StepNorm | None, horizon: int, steps: tuple[int, ...]) -> None:
    """Matching undoes the ridge's shrinkage, for a straight path to rounding. Averages stay behind; lfd2 is trained."""
    arrays, speeds = straight(steps, SIZES)
    found = step_of(name, arrays, steps, horizon, step_norm=norm)
    assert_same_steps(found, {key: speed * horizon for key, speed in speeds.items()}, ALGEBRA)


@pytest.mark.parametrize("name", METHODS)
def test_twice_the_scale_is_twice_the_step(name: str) -> None:
    arrays = wander(5, num_snapshots=9, sizes=SIZES)
    once, twice = step_of(name, arrays, STEPS, 200), step_of(name, arrays, STEPS, 200, scale=2.0)
    for key, step in once.items():
        np.testing.assert_array_equal(twice[key], 2 * step)


@pytest.mark.parametrize("name", METHODS)
def test_two_snapshots_are_enough_for_a_finite_step(name: str) -> None:
    arrays = wander(6, num_snapshots=2, sizes=SIZES)
    for step in step_of(name, arrays, (0, 100), 50).values():
        assert np.isfinite(step).all()


# --- norms -----------------------------------------------------------------------------------------------------------


def _norms(arrays: Arrays) -> NDArray[np.float64]:
    return np.array([np.linalg.norm(values) for values in arrays.values()])


@pytest.mark.parametrize("horizon", [50, 200, 800])
def test_matched_steps_are_as_long_as_the_matched_move(horizon: float) -> None:
    arrays = wander(13, num_snapshots=9, sizes=SIZES)
    origin = 100 + 800 / (1 + horizon / 800)
    moves = _norms({key: values[-1] - weights_at(values, STEPS, origin) for key, values in arrays.items()})
    np.testing.assert_allclose(_norms(step_of("k5", arrays, STEPS, horizon, step_norm="match-plain")), moves, rtol=ALGEBRA)
    stretched = moves * (1 + horizon / 800)
    np.testing.assert_allclose(_norms(step_of("k5", arrays, STEPS, horizon, step_norm="match")), stretched, rtol=ALGEBRA)


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
    assert_same_steps(step_of("k5", arrays, STEPS, 200), step_of("k5", arrays, STEPS, 200, step_norm="clip"), 0)
    assert_same_steps(step_of("line", arrays, STEPS, 200), step_of("line", arrays, STEPS, 200, step_norm="free"), 0)


# --- how many snapshots are read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THINNED)
def test_a_long_history_is_thinned_evenly_and_forecast_as_if_no_more_had_been_saved(name: str) -> None:
    """Before its norm is set: the past move costs no file, and is taken from the whole history."""
    most = METHODS[name].max_context
    assert most is not None
    arrays = wander(19, num_snapshots=41, sizes=SIZES)
    step = plain_step(METHODS[name], make_task(arrays, range(100, 4200, 100), 2000))
    used = LinearMap.from_updates([step], 40).used
    keep = np.linspace(0, 40, most).round().astype(int)
    assert set(used) <= set(keep.tolist())
    thinned = {key: values[keep] for key, values in arrays.items()}
    expected = step_of(name, thinned, tuple(100 + 100 * int(index) for index in keep), 2000, step_norm="free")
    assert_same_steps(applied(step, arrays), expected, ALGEBRA)


@pytest.mark.parametrize("name", THINNED)
def test_a_thinned_history_from_between_two_snapshots_still_ends_at_the_origin(name: str) -> None:
    """Of a straight path, which any thinning continues exactly."""
    steps = tuple(range(0, 3000, 100))
    arrays, speeds = straight(steps, SIZES)
    task = make_task(arrays, steps, 700, origin=2345.0)
    step = plain_step(METHODS[name], task)
    if METHODS[name].step_norm == "clip":  # a ridge regression, which shrinks
        step = set_step_norm(step, task, "match")
    assert_same_steps(applied(step, arrays), {key: 700 * speed for key, speed in speeds.items()}, ALGEBRA)
    assert not step[:, 24:-2].any()


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("persistence", 1),
        ("line", 3),
        ("line-fit", 5),
        ("lfd2", 2),
        ("average", 20),
        ("trend", 24),
        ("average-extrapolate", 10),
        ("accelerate", 11),
        ("k5", 8),
        ("window-means", 10),
        ("rank-1", 9),
        ("drift", 9),
        ("blend", 9),
    ],
)
def test_a_method_reads_few_snapshots_of_a_long_history(name: str, most: int) -> None:
    """Whether the run moves smoothly or is hardly more than noise, as `average` likes it long."""
    for roughness in (0.3, 300.0):
        arrays = wander(20, num_snapshots=102, sizes={"w": 30}, roughness=roughness)
        arrays["w"] += roughness * np.random.default_rng(20).normal(size=(102, 30))
        step = forecast(METHODS[name], make_task(arrays, range(100, 10_300, 100), 900))
        assert len(LinearMap.from_updates([step], 101).used) <= most


def test_of_evenly_saved_snapshots_the_default_reads_seven_a_quarter_of_the_history_ahead() -> None:
    """Five are the points of k5, which needs no neighbours of theirs, and two more lie in the window of the drift."""
    arrays = wander(21, num_snapshots=41, sizes={"w": 30})
    step = forecast(METHODS["blend"], make_task(arrays, range(100, 4200, 100), 1000))
    assert LinearMap.from_updates([step], 40).used == [0, 10, 20, 25, 30, 35, 40]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.averages])
def test_a_forecast_of_no_steps_ahead_changes_nothing_but_for_what_averages(name: str) -> None:
    """To rounding, and but for two: a line through averages, or through coefficients, does not start at the last weights."""
    arrays = wander(24, num_snapshots=9, sizes=SIZES)
    size = max(float(np.abs(values[-1] - values[0]).max()) for values in arrays.values())
    largest = max(float(np.abs(step).max()) for step in step_of(name, arrays, STEPS, 0).values())
    if name in {"rank-1", "average-extrapolate"}:
        assert largest > 1e-3 * size
    elif name != "lfd2":  # trained on a move of nothing: no more than finite, see above
        assert largest < 1e-9 * size
