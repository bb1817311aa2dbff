"""The two statistics equal what whole vectors give, and the verdict follows from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.forecast.backtest import (
    COHERENCE_GATE,
    RATIO_CEILING,
    RATIO_GATE,
    backtest_ratio,
    coherence,
    decide,
    needed_coherence,
    recent_coherence,
    score,
    trend_lead,
    untestable,
)
from farcast_cli.forecast.forecaster import Options
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from tests.tiny import make_task, statistic, wander, weights_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.forecaster import Task
    from tests.tiny import Arrays

STEPS = tuple(range(100, 1300, 100))
SIZES = {"a": 40, "b": 5, "c": 120}
JUDGED = [name for name, method in METHODS.items() if name != "persistence" and not method.averages]
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size


def _coherence(arrays: Arrays, steps: tuple[int, ...] = STEPS) -> float:
    gram, _ = statistic(arrays, steps)
    return coherence(gram, Timeline(gram.steps, float(steps[-1])))


# --- b, the ratio of errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [100, 300, 1500])
def test_persistence_has_a_ratio_of_one(horizon: int) -> None:
    task = make_task(wander(1, num_snapshots=12, sizes=SIZES), STEPS, horizon)
    assert backtest_ratio(METHODS["persistence"], task) == pytest.approx(1.0, rel=ALGEBRA)


def _origins(horizon: float) -> tuple[float, float, float]:
    """By hand: x, the lead's share, and x's own x, where the forecast from x is fitted."""
    length = 1100.0
    inner = min(length / (1 + horizon / length), STEPS[-2] - 100.0)  # not behind the last snapshot before the truth
    inner_horizon = length - inner
    return 100 + inner, inner_horizon, 100 + inner / (1 + inner_horizon / inner)


def _line_oracle(values: NDArray[np.float64], horizon: float) -> NDArray[np.float64]:
    """The forecast of the last weights from those at x, read along chords; clipped to the move before."""
    origin, ahead, earlier = _origins(horizon)
    half = (100 + origin) / 2
    now, before = weights_at(values, STEPS, origin), weights_at(values, STEPS, half)
    step = (now - before) * ahead / (origin - half)
    return now + step * min(1.0, float(np.linalg.norm(now - weights_at(values, STEPS, earlier)) / np.linalg.norm(step)))


def _k5_oracle(values: NDArray[np.float64], horizon: float) -> NDArray[np.float64]:
    origin, _, earlier = _origins(horizon)

    def flows(end: float) -> NDArray[np.float64]:
        points = [weights_at(values, STEPS, 100 + (end - 100) * i / 4) for i in range(5)]
        return np.diff(np.stack(points), axis=0).T

    inputs, move = flows(earlier), weights_at(values, STEPS, origin) - weights_at(values, STEPS, earlier)
    normal = inputs.T @ inputs
    step = flows(origin) @ np.linalg.solve(normal + 0.01 * np.trace(normal) / 4 * np.eye(4), inputs.T @ move)
    return weights_at(values, STEPS, origin) + step * min(1.0, float(np.linalg.norm(move) / np.linalg.norm(step)))


@pytest.mark.parametrize("horizon", [100, 275, 1100, 1600])
@pytest.mark.parametrize(("name", "oracle"), [("line", _line_oracle), ("k5", _k5_oracle)])
def test_the_ratio_is_that_of_forecasting_the_last_weights_from_earlier_ones(name: str, oracle: object, horizon: int) -> None:
    assert callable(oracle)
    arrays = wander(2, num_snapshots=12, sizes=SIZES)
    origin, _, _ = _origins(horizon)
    wrong = np.concatenate([oracle(values, horizon) - values[-1] for values in arrays.values()])
    nothing = np.concatenate([weights_at(values, STEPS, origin) - values[-1] for values in arrays.values()])
    expected = np.linalg.norm(wrong) / np.linalg.norm(nothing)
    found = backtest_ratio(METHODS[name], make_task(arrays, STEPS, horizon))
    assert found == pytest.approx(expected, rel=1e-7)  # normal equations square a problem's condition
    assert expected != pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_the_ratio_sees_nothing_of_the_truth_when_it_forecasts(name: str) -> None:
    """Moving the snapshots after x moves the truth, and not the forecast: the two errors differ by that move alone.

    Orthogonal to all that was: it adds its own square to both squared errors.
    """
    arrays = wander(3, num_snapshots=12, sizes={"w": 200})
    task = make_task(arrays, STEPS, 1100)  # x = 650: snapshots from 800 on are out of the forecast's sight
    other = {"w": np.concatenate([arrays["w"], np.zeros((12, 1))], axis=1)}
    other["w"][7:, -1] = 5.0
    plain = {"w": np.concatenate([arrays["w"], np.zeros((12, 1))], axis=1)}
    tasks = [replace(make_task(values, STEPS, 1100), sample=task.sample) for values in (plain, other)]
    scale = [one.gram.total_norm(one.matched_move) for one in tasks]
    errors = [backtest_ratio(METHODS[name], one) * size for one, size in zip(tasks, scale, strict=True)]
    if name != "lfd2":  # its constant moves the new weight, too
        assert errors[1] ** 2 == pytest.approx(errors[0] ** 2 + 25.0, rel=1e-9)
    assert scale[1] ** 2 == pytest.approx(scale[0] ** 2 + 25.0, rel=1e-9)


@pytest.mark.parametrize("horizon", [1, 400])
@pytest.mark.parametrize("name", ["line", "line-fit", "drift", "blend", "rank-1", "average-extrapolate"])
def test_a_straight_path_is_forecast_without_error(name: str, horizon: int) -> None:
    """To 1e-5: the squared error is a difference of numbers of one size, exact to 1e-16 of the weights' path.

    One step of a path of 1,100 is that much smaller than the path.
    """
    arrays = {"w": np.array(STEPS)[:, None] * np.random.default_rng(4).normal(size=50)}
    assert backtest_ratio(METHODS[name], make_task(arrays, STEPS, horizon), as_written=True) < 1e-5


def test_a_run_that_never_moved_has_no_ratio() -> None:
    assert math.isnan(backtest_ratio(METHODS["line"], make_task({"w": np.ones((12, 3))}, STEPS, 100)))


def test_scores_come_for_every_method_at_every_horizon_that_can_be_tested() -> None:
    task = make_task(wander(5, num_snapshots=12, sizes=SIZES), STEPS, 100, options=Options(step_norm="free"))
    found = score([METHODS["k5"], METHODS["line"]], task, [100, 1650, 1651])
    assert [(one.method, one.horizon) for one in found] == [("k5", 100), ("line", 100), ("k5", 1650), ("line", 1650)]
    for one in found:
        at_horizon = replace(task, horizon=float(one.horizon), options=Options())
        assert one.ratio == backtest_ratio(METHODS[one.method], at_horizon)
        assert one.ratio_as_written == backtest_ratio(METHODS[one.method], at_horizon, as_written=True)


# --- S, the coherence ------------------------------------------------------------------------------------------------


def test_a_straight_path_is_wholly_coherent() -> None:
    arrays = {"w": np.array(STEPS)[:, None] * np.random.default_rng(6).normal(size=50) + 3.0}
    assert _coherence(arrays) == pytest.approx(1.0, abs=ALGEBRA)


def test_a_path_that_turns_back_half_way_is_wholly_incoherent() -> None:
    steps = tuple(range(0, 1100, 100))
    arrays = {"w": (500 - np.abs(np.array(steps) - 500))[:, None] * np.random.default_rng(7).normal(size=50)}
    assert _coherence(arrays, steps) == pytest.approx(-1.0, abs=ALGEBRA)


def test_random_walks_have_a_coherence_near_zero() -> None:
    """Halves are independent but for the shared end: with 20,000 weights the cosine is within .05 of its small mean."""
    random = np.random.default_rng(8)
    walk = np.cumsum(random.normal(size=(40, 20_000)), axis=0)
    assert abs(_coherence({"w": walk}, tuple(range(0, 4000, 100)))) < 0.1


def test_the_coherence_is_the_cosine_of_the_slopes_of_both_halves_over_all_tensors() -> None:
    steps = tuple(range(0, 1100, 100))  # the middle, 500, is a snapshot of both halves
    arrays = wander(9, num_snapshots=11, sizes=SIZES)
    whole = np.concatenate(list(arrays.values()), axis=1)
    early, late = np.polyfit(steps[:6], whole[:6], 1)[0], np.polyfit(steps[5:], whole[5:], 1)[0]
    expected = early @ late / np.linalg.norm(early) / np.linalg.norm(late)
    assert _coherence(arrays, steps) == pytest.approx(expected, rel=ALGEBRA)


def test_too_few_snapshots_or_none_that_moved_have_no_coherence() -> None:
    assert math.isnan(_coherence(wander(10, num_snapshots=4, sizes=SIZES), STEPS[:4]))
    assert math.isnan(_coherence({"w": np.ones((12, 3))}))


def _recent(arrays: Arrays, steps: Sequence[int], origin: float | None = None) -> float:
    gram, _ = statistic(arrays, steps)
    return recent_coherence(gram, Timeline(gram.steps, float(steps[-1] if origin is None else origin)))


@pytest.mark.parametrize(
    ("steps", "early", "late"),
    [
        (tuple(range(0, 1700, 100)), slice(8, 13), slice(12, 17)),  # 800 .. 1600; 1200 is of both halves
        (tuple(range(50, 1700, 100)), slice(8, 13), slice(12, 17)),  # 850 .. 1650
        (tuple(range(0, 1600, 100)), slice(8, 12), slice(12, 16)),  # from 750; 1125 falls between two
        ((0, 10, 990, 1000, 1010, 1300, 1490, 1600, 1610, 1650, 1980, 2000), slice(3, 7), slice(7, 12)),
    ],
)
def test_the_recent_coherence_is_the_cosine_of_the_slopes_of_the_last_two_quarters(
    steps: tuple[int, ...], early: slice, late: slice
) -> None:
    arrays = wander(14, num_snapshots=len(steps), sizes=SIZES, roughness=3)
    whole = np.concatenate(list(arrays.values()), axis=1)
    first, second = np.polyfit(steps[early], whole[early], 1)[0], np.polyfit(steps[late], whole[late], 1)[0]
    expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert _recent(arrays, steps) == pytest.approx(expected, rel=ALGEBRA)
    assert _recent(arrays, steps) != pytest.approx(_coherence(arrays, steps), abs=0.01)


@pytest.mark.parametrize(("num_snapshots", "known"), [(12, False), (13, True), (14, False), (15, True)])
def test_the_recent_coherence_needs_four_snapshots_in_each_of_its_quarters(num_snapshots: int, known: bool) -> None:  # noqa: FBT001
    """Of thirteen, the middle one counts in both quarters; where the middle falls between two, it takes fifteen."""
    steps = tuple(range(0, 100 * num_snapshots, 100))
    arrays = wander(15, num_snapshots=num_snapshots, sizes=SIZES)
    assert math.isnan(_recent(arrays, steps)) != known


def test_the_recent_coherence_sees_nothing_after_the_origin_and_nothing_before_its_half() -> None:
    steps = tuple(range(0, 2500, 100))
    arrays = wander(16, num_snapshots=25, sizes=SIZES)
    other = {key: values.copy() for key, values in arrays.items()}
    for values in other.values():
        values[:8] += np.random.default_rng(16).normal(size=values[:8].shape)
        values[17:] = 1000.0
    assert _recent(other, steps, 1600.0) == pytest.approx(_recent(arrays, steps, 1600.0), rel=1e-6)  # beside a larger path


def test_a_run_that_never_moved_has_no_recent_coherence() -> None:
    assert math.isnan(_recent({"w": np.ones((20, 3))}, range(20)))


@pytest.mark.parametrize(
    ("whole", "recent", "lead"), [(0.46, 0.46, 0.1), (0.44, 0.9, 0.0), (0.9, 0.44, 0.0), (-1.0, 1.0, 0.0), (1.0, 1.0, 0.1)]
)
def test_a_trend_is_carried_on_by_a_tenth_where_both_coherences_are_clear_and_else_not_at_all(
    whole: float, recent: float, lead: float
) -> None:
    task = _turning_task(whole, recent, horizon=100)
    assert trend_lead(task.gram, task.timeline) == lead


def test_a_trend_is_carried_on_by_what_is_known_and_not_at_all_where_nothing_is() -> None:
    """Eleven snapshots have no recent coherence, three have none at all."""
    for cosine, lead in ((0.46, 0.1), (0.44, 0.0)):
        task = _steady_task(cosine)
        assert trend_lead(task.gram, task.timeline) == lead
    few = make_task({"w": np.arange(3.0)[:, None] * np.ones((3, 10))}, (0, 100, 200), 100)
    assert trend_lead(few.gram, few.timeline) == 0.0


# --- the verdict -----------------------------------------------------------------------------------------------------


def _steady_task(cosine: float, *, horizon: float = 300) -> Task:
    """A run whose halves move at a given angle: S is its cosine."""
    steps = np.arange(0, 1100, 100)
    first, second = np.minimum(steps, 500), np.maximum(steps - 500, 0)
    across = np.sqrt(1 - cosine**2)
    plane = np.stack([first + cosine * second, across * second], axis=1).astype(float)
    return make_task({"w": np.tile(plane, (1, 500))}, tuple(steps), horizon)  # enough weights for the usual limit


def test_the_task_for_the_verdict_has_the_asked_for_coherence() -> None:
    for cosine in (-1.0, 0.0, 0.3):
        task = _steady_task(cosine)
        assert coherence(task.gram, task.timeline) == pytest.approx(cosine, abs=ALGEBRA)


@pytest.mark.parametrize(("above", "verdict"), [(1e-6, "forecast"), (-1e-6, "abstain"), (0.5, "forecast"), (-1.0, "abstain")])
@pytest.mark.parametrize("horizon", [100, 300])
@pytest.mark.parametrize("name", JUDGED)
def test_to_resume_from_the_coherence_decides(name: str, horizon: int, above: float, verdict: str) -> None:
    """Eleven snapshots: too few to ask the recent half by itself, and so the whole must be as coherent as that."""
    gate = needed_coherence(horizon / 1000)
    decision = decide(METHODS[name], _steady_task(gate + above, horizon=horizon), "resume")
    assert decision.coherence == pytest.approx(gate + above, abs=ALGEBRA)
    assert math.isnan(decision.recent)
    if decision.ratio > RATIO_CEILING and above > 0:
        assert (decision.verdict, decision.reason) == ("abstain", f"back-test ratio b = {decision.ratio:.2f}, limit 1.3")
        return
    assert decision.verdict == verdict
    assert decision.reason == f"coherence S = {gate + above:.2f}, needed {gate:.2g}"


def _turning_task(whole: float, recent: float, *, horizon: float, num_snapshots: int = 17) -> Task:
    """A run that turns at its half and at three quarters, so that it has the asked-for S over all of it and of late.

    The first half moves along u, the third quarter along a and the last along b, with cos(a, b) = `recent` and equal
    speeds: the slope of the second half lies along a + b, at the angle to u that `whole` asks for.
    """
    steps = np.linspace(0, 1600, num_snapshots)
    leaving = np.clip(steps, 0, 800), np.clip(steps - 800, 0, 400), np.clip(steps - 1200, 0, 400)
    half = np.arccos(recent) / 2
    early = np.array([whole, 0.0, np.sqrt(1 - whole**2)])
    third, fourth = (np.array([np.cos(half), side * np.sin(half), 0.0]) for side in (1, -1))
    path = sum(np.outer(time, way) for time, way in zip(leaving, (early, third, fourth), strict=True))
    return make_task({"w": np.tile(path, (1, 500))}, tuple(steps.astype(int).tolist()), horizon)


@pytest.mark.parametrize(("whole", "recent"), [(0.0, 0.5), (0.9, 0.1), (-0.5, 0.9)])
def test_the_turning_run_has_the_asked_for_coherences(whole: float, recent: float) -> None:
    task = _turning_task(whole, recent, horizon=100)
    assert coherence(task.gram, task.timeline) == pytest.approx(whole, abs=ALGEBRA)
    assert recent_coherence(task.gram, task.timeline) == pytest.approx(recent, abs=ALGEBRA)


def test_a_longer_leap_needs_a_clearer_drift_and_one_under_a_falling_rate_less_of_it() -> None:
    assert [needed_coherence(lead) for lead in (0.01, 0.25, 1.0)] == [0.15, 0.15, 0.3]
    assert needed_coherence(1.0, pace=0.5) == 0.15
    assert needed_coherence(1.0, pace=2.0) == 0.3  # a rising rate anneals nothing


@pytest.mark.parametrize(("above", "verdict"), [(0.01, "forecast"), (-0.01, "abstain")])
@pytest.mark.parametrize("horizon", [100, 400, 800, 2400])
def test_of_the_whole_history_the_same_is_needed_at_every_horizon_where_the_recent_half_vouches_for_it(
    horizon: int, above: float, verdict: str
) -> None:
    """By `line-fit`, whose b is small where only the last quarter goes on."""
    whole = COHERENCE_GATE + above
    decision = decide(METHODS["line-fit"], _turning_task(whole, 0.9, horizon=horizon), "resume")
    assert (decision.verdict, decision.reason) == (verdict, f"coherence S = {whole:.2f}, needed 0.15")
    assert decision.recent == pytest.approx(0.9, abs=ALGEBRA)


@pytest.mark.parametrize(("above", "verdict"), [(0.01, "forecast"), (-0.01, "abstain"), (-1.0, "abstain")])
@pytest.mark.parametrize(
    ("horizon", "gate"), [(100, 0.15), (400, 0.15), (800, 0.15 * 2**0.5), (1600, 0.3), (2400, 0.15 * 6**0.5)]
)
def test_with_enough_snapshots_the_recent_half_must_be_coherent_too_and_more_so_for_a_longer_leap(
    horizon: int, gate: float, above: float, verdict: str
) -> None:
    recent = gate + above
    decision = decide(METHODS["line-fit"], _turning_task(0.9, recent, horizon=horizon), "resume")
    assert decision.verdict == verdict
    assert decision.recent == pytest.approx(recent, abs=ALGEBRA)
    assert decision.coherence == pytest.approx(0.9, abs=ALGEBRA)
    if verdict == "abstain":
        assert decision.reason == f"coherence S = {recent:.2f} in the recent half, needed {gate:.2g}"


@pytest.mark.parametrize("horizon", [50, 400, 800, 1600])
@pytest.mark.parametrize("name", JUDGED)
def test_a_run_that_moved_early_and_only_diffuses_now_is_not_forecast(name: str, horizon: int) -> None:
    """It stopped two thirds through its history, so that both halves show the move: S alone would let it pass."""
    random, steps = np.random.default_rng(13), np.arange(0, 4100, 100)
    moved = (np.minimum(steps, 2600) / 100)[:, None] * random.normal(size=4000)
    diffused = 0.5 * np.cumsum(random.normal(size=(41, 4000)), axis=0)
    decision = decide(METHODS[name], make_task({"w": moved + diffused}, tuple(steps.tolist()), horizon), "resume")
    assert decision.coherence > 0.7
    assert decision.recent < COHERENCE_GATE
    assert decision.verdict == "abstain"


def _random_walk(steps: Sequence[int], horizon: int, *, seed: int, size: int = 5000) -> Task:
    moves = np.random.default_rng(seed).normal(size=(len(steps), size)) * np.sqrt(np.diff([0, *steps]))[:, None]
    return make_task({"w": np.cumsum(moves, axis=0)}, tuple(steps), horizon)


@pytest.mark.parametrize("horizon", [1, 10, 25, 50, 100, 300])
@pytest.mark.parametrize("name", JUDGED)
def test_a_random_walk_passes_no_gate_however_short_the_horizon(name: str, horizon: int) -> None:
    """A test that began between the last two snapshots would have seen part of the truth."""
    for seed in range(5):
        task = _random_walk(range(100, 1300, 100), horizon, seed=seed)
        assert decide(METHODS[name], task, "evaluation").verdict == "abstain"
        assert decide(METHODS[name], task, "resume").verdict == "abstain"


@pytest.mark.parametrize("lead", [0.02, 0.1, 0.25, 0.5, 1.0, 1.4])
@pytest.mark.parametrize("num_snapshots", [8, 20, 40])
@pytest.mark.parametrize("seed", range(5))
def test_a_random_walk_is_never_resumed_from_however_long_its_history(num_snapshots: int, lead: float, seed: int) -> None:
    """At no lead, with the recent half in sight (20 and 40 snapshots) or not (8)."""
    steps = range(100, 100 * num_snapshots + 1, 100)
    task = _random_walk(steps, max(1, round(lead * (steps[-1] - steps[0]))), seed=seed, size=20_000)
    for name in ("blend", "drift", "line", "k5"):
        decision = decide(METHODS[name], task, "resume")
        assert decision.verdict == "abstain"
        assert math.isnan(decision.recent) == (num_snapshots == 8)


@pytest.mark.parametrize("steps", [(0, 100, 200, 300, 400, 500, 600, 2000), (1, 3, 10, 30, 100, 300, 1000)])
def test_a_half_of_the_history_without_snapshots_of_its_own_gives_no_coherence(steps: tuple[int, ...]) -> None:
    """Both halves would share one long move, which goes its own way."""
    decision = decide(METHODS["blend"], _random_walk(steps, 300, seed=0), "resume")
    assert np.isnan(decision.coherence)
    assert decision.verdict == "untestable"


@pytest.mark.parametrize("size", [10, 100])
def test_a_random_walk_of_few_weights_hardly_ever_passes(size: int) -> None:
    """Two random directions in few dimensions are easily alike: p tells."""
    tasks = [_random_walk(range(100, 1300, 100), 300, seed=seed, size=size) for seed in range(60)]
    assert sum(decide(METHODS["drift"], task, "resume").verdict == "forecast" for task in tasks) <= 2


@pytest.mark.parametrize("dimensions", [3, 10, 30])
@pytest.mark.parametrize("num_snapshots", [10, 14, 20])
def test_of_random_walks_in_few_dimensions_two_in_a_hundred_pass_at_most(num_snapshots: int, dimensions: int) -> None:
    """Of 150; most of those that pass S alone are turned away."""
    steps = range(0, 100 * num_snapshots, 100)
    decisions = [
        decide(METHODS["drift"], _random_walk(steps, 200, seed=seed, size=dimensions), "resume") for seed in range(150)
    ]
    assert sum(d.verdict == "forecast" for d in decisions) <= 3
    assert sum(d.coherence > COHERENCE_GATE for d in decisions) > 15


def test_a_coherence_that_chance_alone_gives_is_turned_away_and_said_to_be() -> None:
    """A walk in three dimensions whose halves are alike, as they are in one of three."""
    found = [decide(METHODS["drift"], _random_walk(STEPS, 200, seed=seed, size=3), "resume") for seed in range(40)]
    turned_away = [d for d in found if d.coherence > 0.5 and d.ratio < RATIO_CEILING]
    assert turned_away
    for decision in turned_away:
        assert decision.verdict == "abstain"
        p = f"{decision.significance.p:.2g}"
        assert decision.reason == f"p = {p} of coherence S = {decision.coherence:.2f}, limit {decision.significance.limit:.2g}"


def test_a_slow_drift_under_much_noise_is_told_from_chance() -> None:
    """S of .22, as on fine-tuning runs whose leaps gained: as small a p as there is."""
    rng = np.random.default_rng(3)
    drift = np.outer(np.arange(12), rng.normal(size=5000))
    task = make_task({"w": 0.24 * drift + np.cumsum(rng.normal(size=(12, 5000)), axis=0)}, range(0, 1200, 100), 400)
    decision = decide(METHODS["drift"], task, "resume")
    assert 0.2 < decision.coherence < 0.25
    assert decision.significance.p == decision.significance.smallest
    assert decision.verdict == "forecast"


@pytest.mark.parametrize("periods", [1, 2, 3, 4])
@pytest.mark.parametrize("num_snapshots", [10, 20, 60])
def test_a_cycle_is_never_resumed_from_however_it_fits_the_halves_of_the_history(num_snapshots: int, periods: int) -> None:
    times = np.arange(num_snapshots) * 2 * np.pi * periods / num_snapshots
    cycle = np.stack([np.sin(times), np.cos(times)], axis=1) @ np.random.default_rng(5).normal(size=(2, 3000))
    for horizon in (100, 300):
        task = make_task({"w": cycle}, range(0, 100 * num_snapshots, 100), horizon)
        assert decide(METHODS["blend"], task, "resume").verdict == "abstain"


def test_a_method_that_was_twice_as_wrong_as_nothing_is_not_resumed_from() -> None:
    """A run that swings back and forth over the whole history looks steady to the coherence."""
    steps = tuple(range(100, 1300, 100))
    swing = np.sin(2 * np.pi * np.arange(4, 16) / 5)[:, None] * np.ones(2000)
    decision = decide(METHODS["blend"], make_task({"w": swing}, steps, 300), "resume")
    assert decision.coherence > 0.9
    assert decision.ratio > 2
    assert decision.verdict == "abstain"


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("seed", range(6))
def test_to_evaluate_the_ratio_decides(name: str, seed: int) -> None:
    arrays = wander(seed, num_snapshots=12, sizes=SIZES, roughness=[0.1, 1, 2, 3, 5, 30][seed])
    task = make_task(arrays, STEPS, 300)
    decision, ratio = decide(METHODS[name], task, "evaluation"), backtest_ratio(METHODS[name], task)
    assert decision.ratio == ratio
    assert decision.verdict == ("forecast" if ratio < RATIO_GATE else "abstain")


def test_smooth_runs_pass_the_ratios_gate_and_rough_ones_do_not() -> None:
    verdicts = [
        decide(METHODS["k5"], make_task(wander(1, num_snapshots=12, sizes=SIZES, roughness=rough), STEPS, 300), "evaluation")
        for rough in (0.1, 100.0)
    ]
    assert [decision.verdict for decision in verdicts] == ["forecast", "abstain"]


@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
@pytest.mark.parametrize("name", METHODS)
def test_fewer_than_six_snapshots_or_a_horizon_over_one_and_a_half_histories_are_untestable(
    name: str, purpose: Purpose
) -> None:
    arrays = wander(12, num_snapshots=12, sizes=SIZES)
    few = make_task(arrays, STEPS, 100, origin=500.0)
    far = make_task(arrays, STEPS, 1651)
    for task, reason in (
        (few, "the history has 5 snapshots: a test needs 6"),
        (far, "a horizon of 1651 is more than 1.5 times the history of 1100"),
    ):
        decision = decide(METHODS[name], task, purpose)
        assert (decision.verdict, decision.reason) == ("untestable", reason)
        assert math.isnan(decision.ratio)
        assert math.isnan(decision.coherence)


def test_six_snapshots_and_one_and_a_half_histories_can_be_tested() -> None:
    arrays = wander(12, num_snapshots=12, sizes=SIZES)
    assert untestable(make_task(arrays, STEPS, 750, origin=600.0)) == ""
    assert untestable(make_task(arrays, STEPS, 1650)) == ""


@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
def test_persistence_always_passes(purpose: Purpose) -> None:
    decision = decide(METHODS["persistence"], _steady_task(-1.0), purpose)
    assert (decision.verdict, decision.ratio) == ("forecast", 1.0)


@pytest.mark.parametrize("horizon", [1, 300, 1500])
@pytest.mark.parametrize("name", ["average", "accelerate"])
def test_an_average_passes_to_evaluate_and_never_to_resume_from(name: str, horizon: int) -> None:
    for cosine in (-1.0, 1.0):
        task = _steady_task(cosine, horizon=horizon)
        evaluated = decide(METHODS[name], task, "evaluation")
        assert evaluated.verdict == "forecast"
        assert math.isnan(evaluated.expected)  # there are no later weights that it would be compared with
        assert decide(METHODS[name], task, "resume").verdict == "abstain"


@pytest.mark.parametrize(("cosine", "horizon"), [(-1.0, 0), (0.4, 1), (1.0, 0), (1.0, 100), (1.0, 101)])
def test_a_trend_passes_to_evaluate_as_far_as_it_says_where_the_run_is(cosine: float, horizon: int) -> None:
    """A step of grace, for a tenth of the history that was rounded."""
    decision = decide(METHODS["trend"], _steady_task(cosine, horizon=horizon), "evaluation")
    assert (decision.verdict, decision.reason) == ("forecast", "an average of snapshots, not a forecast: b does not judge it")


@pytest.mark.parametrize(
    ("task", "verdict"),
    [(_steady_task(1.0, horizon=102), "forecast"), (_random_walk(range(100, 1300, 100), 2, seed=0), "abstain")],
    ids=["straight", "random walk"],
)
def test_a_trend_that_is_carried_on_further_is_judged_by_its_ratio(task: Task, verdict: str) -> None:
    decision = decide(METHODS["trend"], task, "evaluation")
    assert decision.verdict == verdict
    assert decision.ratio == backtest_ratio(METHODS["trend"], task)
    assert decision.reason.startswith("back-test ratio b = ")


@pytest.mark.parametrize("horizon", [1, 100, 500])
def test_a_trend_is_never_resumed_from(horizon: int) -> None:
    decision = decide(METHODS["trend"], _steady_task(1.0, horizon=horizon), "resume")
    assert (decision.verdict, decision.reason) == (
        "abstain",
        "resuming from an average puts a run back: use it for evaluation only",
    )


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
def test_a_run_that_never_moved_gives_no_reason_to_forecast(name: str, purpose: Purpose) -> None:
    assert decide(METHODS[name], make_task({"w": np.ones((12, 3))}, STEPS, 300), purpose).verdict == "abstain"


@pytest.mark.parametrize("frozen_from", [9, 12, 15])
def test_a_run_that_stopped_moving_is_not_forecast(frozen_from: int) -> None:
    speed = np.random.default_rng(0).standard_normal(50)
    arrays = {"w": np.outer(np.minimum(np.arange(20), frozen_from), speed)}
    for horizon in (190, 475, 950):
        decision = decide(METHODS["blend"], make_task(arrays, range(0, 2000, 100), horizon), "resume")
        assert decision.verdict == "abstain"


@pytest.mark.parametrize(("num_snapshots", "settles_in"), [(20, 4), (14, 2), (8, 1)])
def test_a_run_that_has_settled_is_not_forecast(num_snapshots: int, settles_in: int) -> None:
    rng = np.random.default_rng(1)
    way = rng.standard_normal(2000)
    times = np.arange(num_snapshots)
    arrays = {"w": np.outer(1 - np.exp(-times / settles_in), way) + 1e-3 * rng.standard_normal((num_snapshots, 2000))}
    task = make_task(arrays, range(0, 100 * num_snapshots, 100), 50 * (num_snapshots - 1))
    assert decide(METHODS["blend"], task, "resume").verdict == "abstain"
