"""What a method would have been worth inside the run's own history, and the verdict that follows.

Two statistics (docs/method.md): b, the ratio of errors of the same forecast made earlier, and S, the coherence of the
run's drift. S decides what to resume from; b decides what to evaluate. Both are always shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from farcast_cli.forecaster import Method, Options, Task, forecast, plain_step, set_step_norm
from farcast_cli.trajectory import MIN_SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.gram import Gram
    from farcast_cli.timeline import Timeline

Purpose = Literal["resume", "evaluation"]
Verdict = Literal["forecast", "abstain", "untestable"]

COHERENCE_GATE = 0.1  # S over which leaps gained; flat from .05 to .2
SIGNIFICANCE = 3.0  # standard deviations of the cosine of two random directions, 1/sqrt(N): matters below 1,000 weights
MAX_COHERENCE_GATE = 0.95
RATIO_CEILING = 2.0  # b over which no forecast is resumed from, whatever S says; the useful ones had 1.3 at most
RATIO_GATE = 0.95  # b under which 0 of 86 forecasts were worse than nothing
MAX_HORIZON = 1.5  # of the history's length
LOSS_JUMP = 0.7  # b over which the loss rises at once before it falls


@dataclass(frozen=True, slots=True)
class Score:
    """A method at a horizon: b on the clipped step, and the ratio of the step as it would be written."""

    method: str
    horizon: int
    ratio: float
    ratio_as_written: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one forecast, with its two numbers (nan where they cannot be had) and the reason in words."""

    verdict: Verdict
    ratio: float
    coherence: float
    reason: str
    expected: float = float("nan")
    """The ratio of the step as it is written, not clipped: what to expect of the weights' error."""


def coherence(gram: Gram, timeline: Timeline) -> float:
    """S = cos(v[t_0, mid], v[mid, s]): whether the second half of the history moves like the first.

    Each half's slope is taken over real snapshots alone, so that no move is counted in both.

    Returns:
        -1..1; nan where a half has fewer than two snapshots or nothing moved.
    """
    if timeline.num_snapshots < MIN_SNAPSHOTS - 1:
        return float("nan")
    middle = timeline.first + timeline.length / 2
    seen = [float(step) for step in timeline.steps if step <= timeline.origin]
    halves = [step for step in seen if step <= middle], [step for step in seen if step >= middle]
    if min(map(len, halves)) < 2:  # noqa: PLR2004 - a slope takes two
        return float("nan")
    early, late = (timeline.slope_over(half) for half in halves)
    total = gram.matrix.sum(axis=0)
    size = np.sqrt(max(early @ total @ early, 0.0) * max(late @ total @ late, 0.0))
    return float(early @ total @ late / size) if size > 0 else float("nan")


def backtest_ratio(method: Method, task: Task, *, as_written: bool = False) -> float:
    """||forecast - truth|| / ||persistence - truth|| for the same lead, made at x and judged at s; nan if nothing moved.

    Clipped unless `as_written`: matching a norm puts noise back and would fail a gate where the direction is good.
    """
    inner, timeline = task.backtest(), task.timeline
    truth = timeline.at(timeline.origin) - timeline.at(inner.timeline.origin)
    scale = task.gram.total_norm(truth)
    if not scale:
        return float("nan")
    step = forecast(method, inner) if as_written else set_step_norm(plain_step(method, inner), inner, "clip")
    return task.gram.total_norm(step - truth) / scale


def score(methods: Sequence[Method], task: Task, horizons: Sequence[int]) -> list[Score]:
    """B of every method at every horizon that the history can test."""
    found = []
    for horizon in horizons:
        at_horizon = replace(task, horizon=float(horizon))
        if untestable(at_horizon):
            continue
        for method in methods:
            ratio = backtest_ratio(method, at_horizon)
            written = backtest_ratio(method, replace(at_horizon, options=Options()), as_written=True)
            found.append(Score(method.name, horizon, ratio, written))
    return found


def untestable(task: Task) -> str:
    """Why the history cannot test this horizon; empty where it can."""
    timeline = task.timeline
    if timeline.num_snapshots < MIN_SNAPSHOTS:
        return f"the history holds {timeline.num_snapshots} snapshots, and a test needs {MIN_SNAPSHOTS}"
    if task.horizon > MAX_HORIZON * timeline.length:
        return f"{task.horizon:.0f} steps ahead is more than {MAX_HORIZON} times the history of {timeline.length:.0f} steps"
    return ""


def decide(method: Method, task: Task, purpose: Purpose) -> Decision:
    """Whether the run's own history says that this forecast would help.

    To resume from: S > .1 (more for fewer than 900 weights) and b <= 2. To evaluate: b < .95. `persistence` moves no weight and always passes; an average to
    evaluate passes too, because b measures the distance to later weights, at which an average does not aim.
    """
    why_not = untestable(task)
    if why_not:
        return Decision("untestable", float("nan"), float("nan"), why_not)
    ratio, steady = backtest_ratio(method, task), coherence(task.gram, task.timeline)
    if method.name == "persistence":
        return Decision("forecast", 1.0, steady, "persistence leaves the weights as they are", expected=1.0)
    if purpose == "evaluation":
        decision = _decide_for_evaluation(method, ratio, steady)
    else:
        decision = _decide_for_resume(method, ratio, steady, num_weights=int(task.sample.sizes.sum()))
    return replace(decision, expected=backtest_ratio(method, task, as_written=True))


def _decide_for_evaluation(method: Method, ratio: float, steady: float) -> Decision:
    if method.averages:
        return Decision("forecast", ratio, steady, "an average of snapshots, not a forecast: b does not judge it")
    return _gate(ratio < RATIO_GATE, ratio, steady, f"back-test ratio b = {ratio:.2f}, limit {RATIO_GATE}")


def _decide_for_resume(method: Method, ratio: float, steady: float, *, num_weights: int) -> Decision:
    if method.averages:
        return Decision("abstain", ratio, steady, "resuming from an average puts a run back: it is for evaluation")
    if np.isnan(steady) and not np.isnan(ratio):
        return Decision("untestable", ratio, steady, "coherence S needs two snapshots in each half of the history")
    if ratio > RATIO_CEILING:
        return Decision("abstain", ratio, steady, f"back-test ratio b = {ratio:.2f}, limit {RATIO_CEILING}")
    limit = max(COHERENCE_GATE, min(MAX_COHERENCE_GATE, SIGNIFICANCE / np.sqrt(num_weights)))
    return _gate(steady > limit, ratio, steady, f"coherence S = {steady:.2f}, needed {limit:.2g}")


def _gate(passed: bool, ratio: float, steady: float, reason: str) -> Decision:  # noqa: FBT001 - the gate's own outcome
    return Decision("forecast" if passed else "abstain", ratio, steady, reason)
