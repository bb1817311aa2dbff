"""The two statistics equal what whole vectors give, and the verdict follows from them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from farcast_cli.backtest import (
    COHERENCE_GATE,
    RATIO_GATE,
    Purpose,
    backtest_ratio,
    coherence,
    decide,
    score,
    untestable,
)
from farcast_cli.forecaster import Options
from farcast_cli.methods import METHODS
from farcast_cli.timeline import Timeline
from tests.tiny import make_task, statistic, torch_settings_kept, wander, weights_at

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.forecaster import Task
    from tests.tiny import Arrays

STEPS = tuple(range(100, 1300, 100))
SIZES = {"a": 40, "b": 5, "c": 120}
JUDGED = [name for name, method in METHODS.items() if name != "persistence" and not method.averages]
ALGEBRA = 1e-9  # relative; a few float64 operations on numbers of one size


@pytest.fixture(autouse=True, scope="module")
def _torch_settings() -> Iterator[None]:
    with torch_settings_kept():
        yield


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
@pytest.mark.parametrize("name", JUDGED)
def test_to_resume_from_the_coherence_decides(name: str, above: float, verdict: str) -> None:
    decision = decide(METHODS[name], _steady_task(COHERENCE_GATE + above), "resume")
    assert decision.verdict == verdict
    assert decision.coherence == pytest.approx(COHERENCE_GATE + above, abs=ALGEBRA)
    assert decision.reason == f"coherence S = {COHERENCE_GATE + above:.2f}, needed 0.1"


def _random_walk(steps: Sequence[int], horizon: int, *, seed: int, size: int = 5000) -> Task:
    moves = np.random.default_rng(seed).normal(size=(len(steps), size)) * np.sqrt(np.diff([0, *steps]))[:, None]
    return make_task({"w": np.cumsum(moves, axis=0)}, tuple(steps), horizon)


@pytest.mark.parametrize("horizon", [1, 10, 25, 50, 100, 300])
@pytest.mark.parametrize("name", JUDGED)
def test_a_random_walk_passes_no_gate_however_short_the_horizon(name: str, horizon: int) -> None:
    """A test that began between the last two snapshots would have seen part of the truth."""
    for seed in range(1 if name == "lfd2" else 5):  # lfd2 is trained anew for each
        task = _random_walk(range(100, 1300, 100), horizon, seed=seed)
        assert decide(METHODS[name], task, "evaluation").verdict == "abstain"
        assert decide(METHODS[name], task, "resume").verdict == "abstain"


@pytest.mark.parametrize("steps", [(0, 100, 200, 300, 400, 500, 600, 2000), (1, 3, 10, 30, 100, 300, 1000)])
def test_a_half_of_the_history_without_snapshots_of_its_own_gives_no_coherence(steps: tuple[int, ...]) -> None:
    """Both halves would share one long move, which goes its own way."""
    decision = decide(METHODS["blend"], _random_walk(steps, 300, seed=0), "resume")
    assert np.isnan(decision.coherence)
    assert decision.verdict == "untestable"


@pytest.mark.parametrize("size", [10, 100])
def test_a_random_walk_of_few_weights_hardly_ever_passes(size: int) -> None:
    """Two random directions in few dimensions are easily alike; the limit is three standard deviations."""
    tasks = [_random_walk(range(100, 1300, 100), 300, seed=seed, size=size) for seed in range(60)]
    assert sum(decide(METHODS["drift"], task, "resume").verdict == "forecast" for task in tasks) <= 2


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
        (few, "the history holds 5 snapshots, and a test needs 6"),
        (far, "1651 steps ahead is more than 1.5 times the history of 1100 steps"),
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


@pytest.mark.parametrize("name", ["average", "accelerate"])
def test_an_average_passes_to_evaluate_and_never_to_resume_from(name: str) -> None:
    for cosine in (-1.0, 1.0):
        task = _steady_task(cosine)
        assert decide(METHODS[name], task, "evaluation").verdict == "forecast"
        assert decide(METHODS[name], task, "resume").verdict == "abstain"


@pytest.mark.parametrize("name", JUDGED)
@pytest.mark.parametrize("purpose", ["resume", "evaluation"])
def test_a_run_that_never_moved_gives_no_reason_to_forecast(name: str, purpose: Purpose) -> None:
    assert decide(METHODS[name], make_task({"w": np.ones((12, 3))}, STEPS, 300), purpose).verdict == "abstain"
