"""What is chosen for a user who names no horizon or leaves the method to the evidence, on runs whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.errors import UsageError
from farcast_cli.forecast.backtest import CLEAR_COHERENCE, decide, lowest_coherence, needed_coherence
from farcast_cli.forecast.choice import NEXT_LEAD, choose_method, default_method, drift_cosine, propose_horizon, usual_horizons
from farcast_cli.forecast.forecaster import forecast
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from tests.tiny import applied, make_task, wander, weights_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.forecaster import Task

LENGTH = 4000
STEPS = tuple(range(0, LENGTH + 1, 100))
ANY = 1.0  # a horizon that is not looked at
BLEND = METHODS["blend"]
LATER_WEIGHTS = [name for name, method in METHODS.items() if not method.averages and name != "persistence"]
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size


def _ways(count: int) -> NDArray[np.float64]:
    """Directions at right angles, (count, 1200)."""
    return np.linalg.qr(np.random.default_rng(1).normal(size=(1200, count)))[0].T


def _steady(steps: tuple[int, ...] = STEPS) -> Task:
    """A straight path."""
    return make_task({"w": np.outer(steps, _ways(1)[0])}, steps, ANY)


def _walk(steps: tuple[int, ...] = STEPS) -> Task:
    moves = np.random.default_rng(2).normal(size=(len(steps), 5000))
    return make_task({"w": np.cumsum(moves, axis=0)}, steps, ANY)


def _braking() -> Task:
    """It keeps its direction and falls to a tenth of its speed at .4 of its history."""
    times = np.array(STEPS, dtype=float)
    return make_task({"w": np.outer(10 * np.minimum(times, 1600) + np.maximum(times - 1600, 0), _ways(1)[0])}, STEPS, ANY)


def _bent(cosine: float, steps: tuple[int, ...] = STEPS, *, turn: float = 0.5) -> Task:
    """Straight but for a bend in its middle: S is the bend's cosine, and 1 in the recent half; at .75 S of late is."""
    times, middle = np.array(steps, dtype=float), steps[0] + turn * (steps[-1] - steps[0])
    first, across = _ways(2)
    early, late = np.minimum(times, middle), np.maximum(times - middle, 0)
    return make_task(
        {"w": np.outer(early, first) + np.outer(late, cosine * first + np.sqrt(1 - cosine**2) * across)}, steps, ANY
    )


def _propose(task: Task, *, name: str = "blend", after_leap: bool = False, steps_left: int | None = None) -> int:
    return propose_horizon(METHODS[name], task, "resume", after_leap=after_leap, steps_left=steps_left)


# --- the horizon to resume from --------------------------------------------------------------------------------------


def test_the_first_leap_is_half_of_the_history() -> None:
    assert _propose(_steady()) == LENGTH // 2


def test_a_leap_after_a_leap_is_1_4_times_the_history_since() -> None:
    assert _propose(_steady(), after_leap=True) == 5600


@pytest.mark.parametrize(("above", "horizon"), [(1e-3, 2000), (-1e-3, 1000)])
def test_the_first_leap_is_a_quarter_of_the_history_where_its_drift_is_less_than_clear(above: float, horizon: int) -> None:
    """Though the gate would let half of it pass."""
    task = _bent(needed_coherence(NEXT_LEAD) + above)
    assert decide(BLEND, replace(task, horizon=2000.0), "resume").verdict == "forecast"
    assert _propose(task) == horizon


def test_a_leap_after_a_leap_falls_back_to_half_of_the_history_where_the_longer_one_was_far_off() -> None:
    """By the slope of the last five snapshots: that from .4 of the history was ten times too steep, that from .67 right."""
    task = _braking()
    verdicts = [decide(METHODS["line-fit"], replace(task, horizon=h), "resume").verdict for h in (5600.0, 2000.0)]
    assert verdicts == ["abstain", "forecast"]
    assert _propose(task, name="line-fit", after_leap=True) == 2000


def test_a_leap_falls_back_to_a_quarter_of_the_history_where_no_longer_one_passes_the_gate() -> None:
    """By the slope of the last five snapshots, on a run that turned far at three quarters: S of late is .18."""
    task = _bent(0.18, turn=0.75)
    verdicts = [decide(METHODS["line-fit"], replace(task, horizon=h), "resume").verdict for h in (5600.0, 2000.0, 1000.0)]
    assert verdicts == ["abstain", "abstain", "forecast"]
    assert _propose(task, name="line-fit", after_leap=True) == 1000
    assert _propose(task, name="line-fit") == 1000


@pytest.mark.parametrize("after_leap", [False, True])
def test_where_the_evidence_supports_none_the_shortest_is_proposed_for_the_gate_to_turn_away(after_leap: bool) -> None:  # noqa: FBT001
    assert _propose(_walk(), after_leap=after_leap) == 1000
    assert decide(BLEND, replace(_walk(), horizon=1000.0), "resume").verdict == "abstain"


@pytest.mark.parametrize(
    ("steps_left", "after_leap", "horizon"),
    [
        (1000, False, 500),
        (3999, False, 1999),
        (4001, False, 2000),
        (10**6, False, 2000),
        (1000, True, 500),
        (10**6, True, 5600),
    ],
)
def test_a_leap_leaves_half_of_the_steps_that_a_run_has_left(steps_left: int, after_leap: bool, horizon: int) -> None:  # noqa: FBT001
    assert _propose(_steady(), after_leap=after_leap, steps_left=steps_left) == horizon


@pytest.mark.parametrize("after_leap", [False, True])
@pytest.mark.parametrize("steps_left", [None, -5, 0, 1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_horizon_to_resume_from_is_never_zero(name: str, steps_left: int | None, after_leap: bool) -> None:  # noqa: FBT001
    """With a history of five steps, of which a quarter is one, or at the end of a run; by averages too."""
    for task in (_steady(tuple(range(6))), _walk(tuple(range(6)))):
        horizon = _propose(task, name=name, after_leap=after_leap, steps_left=steps_left)
        assert 1 <= horizon <= (7 if steps_left is None else 1)


def test_the_horizon_of_the_task_itself_is_not_looked_at() -> None:
    assert {_propose(replace(_bent(0.3), horizon=horizon)) for horizon in (0.0, 1.0, 1e6)} == {1000}


# --- the horizon to evaluate -----------------------------------------------------------------------------------------


def _to_evaluate(task: Task, name: str) -> int:
    return propose_horizon(METHODS[name], task, "evaluation", after_leap=False, steps_left=None)


@pytest.mark.parametrize(("cosine", "horizon"), [(CLEAR_COHERENCE + 0.01, 400), (CLEAR_COHERENCE - 0.01, 0), (-0.5, 0)])
def test_a_trend_to_evaluate_is_carried_on_by_a_tenth_of_a_history_with_a_clear_drift_and_else_not(
    cosine: float, horizon: int
) -> None:
    assert _to_evaluate(_bent(cosine), "trend") == horizon


def test_a_tenth_of_a_history_is_whole_steps() -> None:
    assert _to_evaluate(_steady(tuple(range(0, 45, 4))), "trend") == 4
    assert _to_evaluate(_steady(tuple(range(0, 47, 2))), "trend") == 5  # of 46


@pytest.mark.parametrize("name", ["average", "accelerate"])
def test_an_average_to_evaluate_has_no_horizon(name: str) -> None:
    assert _to_evaluate(_steady(), name) == 0
    assert _to_evaluate(_walk(), name) == 0


def test_a_forecast_of_later_weights_to_evaluate_is_as_long_as_its_ratio_supports() -> None:
    assert _to_evaluate(_steady(), "line") == 2000
    assert _to_evaluate(_walk(), "line") == 1000  # the shortest, for the gate to turn away


def test_a_back_test_is_shown_at_some_shares_of_the_history_in_whole_steps_and_each_once() -> None:
    assert usual_horizons(Timeline(np.array(STEPS), 4000.0)) == (400, 1000, 2000, 4000)
    assert usual_horizons(Timeline(np.array(STEPS), 1500.0)) == (150, 375, 750, 1500)
    assert usual_horizons(Timeline(np.arange(4), 3.0)) == (1, 2, 3)


# --- the method ------------------------------------------------------------------------------------------------------


def test_the_default_is_blend_to_resume_and_to_evaluate_k5_for_later_weights_and_the_trend_without_a_horizon() -> None:
    assert {default_method("resume", horizon=h).name for h in (None, 0, 5.0)} == {"blend"}
    assert default_method("evaluation", horizon=5.0).name == "k5"
    assert {default_method("evaluation", horizon=h).name for h in (None, 0)} == {"trend"}


@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_is_asked_for_is_taken_without_a_word(name: str, purpose: Purpose) -> None:
    assert choose_method(name, _walk(), purpose) == (METHODS[name], "")


def test_without_a_name_the_default_is_taken_without_a_word() -> None:
    task = replace(_steady(), horizon=100.0)
    assert [choose_method(None, task, purpose)[0].name for purpose in ("resume", "evaluation")] == ["blend", "k5"]
    assert choose_method(None, replace(task, horizon=0.0), "evaluation") == (METHODS["trend"], "")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--method magic: expected one of blend"):
        choose_method("magic", _steady(), "resume")


def test_auto_to_resume_takes_what_alone_has_seen_the_run_turn() -> None:
    """It turned at half its history, and the test begins at two thirds: only `line-fit` sees nothing from before."""
    task = replace(_bent(0.0), horizon=2000.0)
    cosines = {name: drift_cosine(METHODS[name], task) for name in LATER_WEIGHTS}
    assert cosines["line-fit"] == pytest.approx(1.0, abs=1e-6)
    assert sorted(cosines.values())[-2] < 0.99
    method, why = choose_method("auto", task, "resume")
    assert method.name == "line-fit"
    assert why == f"its update points best along the drift, cosine 1.00 ({cosines['blend']:.2f} by blend)"


def test_auto_to_resume_stays_with_blend_where_others_point_no_better() -> None:
    """Along a straight path all do alike."""
    method, why = choose_method("auto", replace(_steady(), horizon=1000.0), "resume")
    assert (method.name, why) == ("blend", "no method points better along the drift (cosine 1.00)")


def test_auto_stays_with_the_default_for_a_run_that_never_moved() -> None:
    task = make_task({"w": np.ones((12, 3))}, tuple(range(12)), 3.0)
    assert choose_method("auto", task, "resume")[0].name == "blend"
    assert choose_method("auto", task, "evaluation")[0].name == "trend"


def test_auto_to_evaluate_takes_the_smallest_ratio_of_those_that_pass() -> None:
    task = replace(_bent(0.0), horizon=2000.0)
    decisions = {name: decide(METHODS[name], task, "evaluation") for name in LATER_WEIGHTS}
    assert min(decisions, key=lambda name: decisions[name].ratio) == "line-fit"
    method, why = choose_method("auto", task, "evaluation")
    assert (method.name, why) == ("line-fit", f"smallest back-test ratio, b = {decisions['line-fit'].ratio:.2f}")


def test_auto_to_evaluate_takes_no_method_whose_step_as_written_would_be_worse_than_nothing() -> None:
    """Clipped, a step after the brakes passes; as `line` writes it, it is five times too long."""
    task = replace(_braking(), horizon=2000.0)
    decisions = {name: decide(METHODS[name], task, "evaluation") for name in LATER_WEIGHTS}
    chosen = choose_method("auto", task, "evaluation")[0].name
    assert decisions[chosen].verdict == "forecast"
    assert decisions[chosen].expected < 1
    assert decisions["line"].expected > 1
    able = [d.ratio for d in decisions.values() if d.verdict == "forecast" and d.expected < 1]
    assert decisions[chosen].ratio == min(able)


@pytest.mark.parametrize("horizon", [1.0, 400.0, 2000.0])
def test_auto_to_evaluate_takes_the_trend_where_no_forecast_passes_its_back_test(horizon: float) -> None:
    method, why = choose_method("auto", replace(_walk(), horizon=horizon), "evaluation")
    assert (method.name, why) == ("trend", "no forecast of later weights passes its back-test")


def test_auto_to_evaluate_takes_the_trend_where_no_later_weights_are_asked_for() -> None:
    """A forecast of no steps ahead would be the last snapshot once more, whatever its back-test says of one interval."""
    assert decide(METHODS["k5"], _steady(), "evaluation").verdict == "forecast"
    assert choose_method("auto", replace(_steady(), horizon=0.0), "evaluation")[0].name == "trend"


# --- the cosine that chooses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [50, 400, 1000, 1650])
@pytest.mark.parametrize("name", LATER_WEIGHTS)
def test_the_cosine_is_that_between_the_step_from_earlier_and_the_slope_since(name: str, horizon: int) -> None:
    """The slope by least squares over whole vectors, from the interpolated weights at x on."""
    steps = tuple(range(100, 1300, 100))
    arrays = wander(3, num_snapshots=12, sizes={"a": 40, "b": 120})
    task = make_task(arrays, steps, horizon)
    start = min(100 + 1100 / (1 + horizon / 1100), 1100.0)
    places = [start, *(step for step in steps if step > start)]
    whole = np.concatenate(list(arrays.values()), axis=1)
    slope = np.polyfit(places, np.stack([weights_at(whole, steps, place) for place in places]), 1)[0]
    step = np.concatenate(list(applied(forecast(METHODS[name], task.backtest()), arrays).values()))
    expected = step @ slope / np.linalg.norm(step) / np.linalg.norm(slope)
    assert drift_cosine(METHODS[name], task) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("horizon", [275, 1100])
def test_the_cosine_of_a_line_is_that_of_two_chords_of_the_history(horizon: int) -> None:
    """All by hand: the step is a multiple of w(x) - w((t_0 + x) / 2)."""
    steps = tuple(range(100, 1300, 100))
    values = wander(4, num_snapshots=12, sizes={"w": 160})["w"]
    start = 100 + 1100 / (1 + horizon / 1100)
    step = weights_at(values, steps, start) - weights_at(values, steps, (100 + start) / 2)
    places = [start, *(one for one in steps if one > start)]
    slope = np.polyfit(places, np.stack([weights_at(values, steps, place) for place in places]), 1)[0]
    expected = step @ slope / np.linalg.norm(step) / np.linalg.norm(slope)
    assert drift_cosine(METHODS["line"], make_task({"w": values}, steps, horizon)) == pytest.approx(expected, rel=ALGEBRA)


def test_the_cosine_does_not_depend_on_how_long_a_step_is() -> None:
    task = replace(_bent(0.5), horizon=1000.0)
    longer = replace(task, options=replace(task.options, scale=7.0))
    assert drift_cosine(BLEND, longer) == pytest.approx(drift_cosine(BLEND, task), rel=ALGEBRA)


def test_a_run_that_never_moved_and_a_step_that_is_none_have_no_cosine() -> None:
    assert math.isnan(drift_cosine(BLEND, make_task({"w": np.ones((12, 3))}, tuple(range(12)), 3.0)))
    assert math.isnan(drift_cosine(METHODS["persistence"], replace(_steady(), horizon=100.0)))


def test_the_lowest_coherence_is_of_what_is_known() -> None:
    task = _bent(0.4)
    assert lowest_coherence(task.gram, task.timeline) == pytest.approx(0.4, abs=1e-6)
    few = make_task({"w": np.arange(3.0)[:, None] * np.ones((3, 10))}, (0, 100, 200), ANY)
    assert math.isnan(lowest_coherence(few.gram, few.timeline))
