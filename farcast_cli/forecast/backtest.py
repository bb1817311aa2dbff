"""What a method would have been worth inside the run's own history, and the verdict that follows.

The statistics (docs/method.md): b, the ratio of errors of the same forecast made earlier; S, the coherence of the run's
drift, over the whole history and over its recent half; and p, how often chance alone would give as much. S with its p
decides what to resume from, and b is the guard; b decides what to evaluate. All are always shown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.forecast.forecaster import Method, Options, Task, forecast, plain_step, set_step_norm
from farcast_cli.forecast.significance import NOTHING, Significance, significance
from farcast_cli.run.trajectory import MIN_SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import ClockName, Purpose, Verdict
    from farcast_cli.forecast.gram import Gram
    from farcast_cli.forecast.timeline import Timeline
    from farcast_cli.run.pace import Pace

    Halves = tuple[NDArray[np.float64], NDArray[np.float64]]


COHERENCE_GATE = 0.15  # S that a leap needs up to a quarter of the history; below it the gains were as those of chance
SHORT_LEAD = 0.25  # of the history; what a longer leap needs grows with its root, as the noise that it carries along
MIN_RECENT = 4  # snapshots in each half of the recent half: fewer, and the noise of S alone would turn leaps away
CLEAR_COHERENCE = 0.45  # over which a trend is carried on by
TREND_LEAD = 0.1  # of the history; below it the trend ends at the origin
SPENT_RATE = 0.1  # of the highest rate; of two harmful leaps under a schedule both ended below it
RATIO_CEILING = 1.3  # b over which no forecast is resumed from, whatever S says; the useful ones had 1.2 at most
EXPECTED_CEILING = 2.5  # the same for the step as written: a run that has settled moves far less than it did
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
    recent: float = float("nan")
    """The coherence of the history's recent half; nan where it holds too few snapshots to tell."""
    significance: Significance = NOTHING
    """How often chance alone would give as large an S."""
    is_average: bool = False
    """An average of snapshots, which aims at no later weights, so that b does not judge it."""
    is_weak: bool = False
    """S or p speak against resuming, whatever b is."""
    is_over: bool = False
    """The run has no step left to leap over."""

    @property
    def is_farther(self) -> bool:
        """Whether the forecast's weights are expected to be farther from the later ones than the origin's; nan is not."""
        return self.expected > 1


@dataclass(frozen=True, slots=True)
class Steadiness:
    """What does not depend on a method or a horizon: S, that of the recent half, and how often chance would give S."""

    coherence: float
    recent: float
    significance: Significance


def steadiness(gram: Gram, timeline: Timeline) -> Steadiness:
    """All that a history says of its drift; nan for what it is too short to say."""
    return Steadiness(coherence(gram, timeline), recent_coherence(gram, timeline), significance_of(gram, timeline))


def coherence(gram: Gram, timeline: Timeline) -> float:
    """Whether the second half of the history moves like the first.

        S = cos( v[t_0, mid], v[mid, s] ),   mid = t_0 + L / 2

    Returns:
        -1..1; nan with fewer than five snapshots, or two in a half, or where nothing moved.
    """
    return _coherence_over(gram, _whole_halves(timeline))


def significance_of(gram: Gram, timeline: Timeline) -> Significance:
    """The p of S: how often the run's increments would give as much with the signs of chance; nan where S cannot be had."""
    halves = _whole_halves(timeline)
    return significance(gram, *halves) if halves else NOTHING


def recent_coherence(gram: Gram, timeline: Timeline) -> float:
    """The coherence of the recent half of the history, [s - L/2, s]: whether the run still moves as it did of late.

    Over a long history S says that the early and the late drift agree; only this says that there still is one.

    Returns:
        -1..1; nan with fewer than four snapshots in each half of that stretch.
    """
    return _coherence_over(gram, _halves(timeline, timeline.length / 2, at_least=MIN_RECENT))


def _whole_halves(timeline: Timeline) -> Halves | None:
    return None if timeline.num_snapshots < MIN_SNAPSHOTS - 1 else _halves(timeline, timeline.length, at_least=2)


def _halves(timeline: Timeline, window: float, *, at_least: int) -> Halves | None:
    """The slopes of a window's halves, each over real snapshots alone: no move is counted in both. None with too few."""
    middle = timeline.origin - window / 2
    seen = [float(step) for step in timeline.steps if timeline.origin - window <= step <= timeline.origin]
    halves = [step for step in seen if step <= middle], [step for step in seen if step >= middle]
    if min(map(len, halves)) < at_least:
        return None
    return timeline.slope_over(halves[0]), timeline.slope_over(halves[1])


def _coherence_over(gram: Gram, halves: Halves | None) -> float:
    if halves is None:
        return float("nan")
    early, late = halves
    total = gram.matrix.sum(axis=0)
    size = np.sqrt(max(early @ total @ early, 0.0) * max(late @ total @ late, 0.0))
    return float(early @ total @ late / size) if size > 0 else float("nan")


def backtest_ratio(method: Method, task: Task, *, as_written: bool = False) -> float:
    """The error of the same lead against that of persistence, made at x and judged at s; nan if nothing moved.

        b = || Delta(x) - (w(s) - w(x)) || / || w(s) - w(x) ||

    Clipped unless `as_written`: matching a norm puts noise back and would fail a gate where the direction is good.
    """
    inner, timeline = task.backtest(), task.timeline
    truth = timeline.at(timeline.origin) - timeline.at(inner.timeline.origin)
    scale = task.gram.total_norm(truth)
    if not scale:
        return float("nan")
    step = forecast(method, inner) if as_written else set_step_norm(plain_step(method, inner), inner, "clip")
    return task.gram.total_norm(step - truth) / scale


def tensor_ratios(method: Method, task: Task) -> NDArray[np.float64]:
    """The same b of each tensor by itself, (K,); nan where a tensor did not move."""
    inner, timeline = task.backtest(), task.timeline
    truth = timeline.at(timeline.origin) - timeline.at(inner.timeline.origin)
    step = set_step_norm(plain_step(method, inner), inner, "clip")
    scale, error = task.gram.norms(truth), task.gram.norms(step - truth)
    return np.divide(error, scale, out=np.full_like(scale, np.nan), where=scale > 0)


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
        return f"the history has {timeline.num_snapshots} snapshots: a test needs {MIN_SNAPSHOTS}"
    if task.horizon > MAX_HORIZON * timeline.length:
        return f"a horizon of {task.horizon:.0f} is more than {MAX_HORIZON} times the history of {timeline.length:.0f}"
    return ""


def pace_to(known: Pace, timeline: Timeline, horizon: float, *, wanted: ClockName | None) -> Pace:
    """The clock for a horizon; of one that is longer than `fit` looks ahead, it says so.

    Raises:
        UsageError: rates are wanted and not known.
    """
    found = known.clocked(wanted, timeline.first, timeline.origin + horizon)
    longest = MAX_HORIZON * timeline.length
    if found.rates or wanted or horizon <= longest or not known.rates:
        return found
    if not known.covers(timeline.first, timeline.origin + longest):
        return found  # not even those are known
    until = f"step {known.edges[-1]}, {MAX_HORIZON} times the history ahead"
    return replace(found, why=f"the forecaster has the learning rates up to {until}")


def decide(method: Method, task: Task, purpose: Purpose) -> Decision:
    """Whether the run's own history says that this forecast would help.

    To resume from: S > .15, with a p that speaks against chance; S > .15 in the recent half, and more for horizons over a
    quarter of the history; and b <= 1.3. To evaluate: b < .95. `persistence` moves no weight and always passes; an
    average to evaluate passes too, because b measures the distance to later weights, at which it does not aim.
    """
    why_not = untestable(task)
    if why_not:
        return Decision("untestable", float("nan"), float("nan"), why_not)
    average = purpose == "evaluation" and _is_average(method, task)
    found = Decision(
        "abstain",
        backtest_ratio(method, task),
        coherence(task.gram, task.timeline),
        reason="",
        expected=float("nan") if average else backtest_ratio(method, task, as_written=True),
        recent=recent_coherence(task.gram, task.timeline),
        significance=significance_of(task.gram, task.timeline),
        is_average=average,
    )
    if method.name == "persistence":
        return replace(found, verdict="forecast", ratio=1.0, reason="persistence does not change the weights")
    if average:
        return replace(found, verdict="forecast", reason="an average of snapshots, not a forecast: b does not judge it")
    if purpose == "evaluation":
        return _gate(found, found.ratio < RATIO_GATE, f"back-test ratio b = {found.ratio:.2f}, limit {RATIO_GATE}")
    return _decide_for_resume(method, task, found)


def needed_coherence(lead: float, *, pace: float = 1.0) -> float:
    """The coherence that the recent half must exceed for a leap: .15 sqrt(max(1, r / .25)) min(1, pace).

    Args:
        lead: r, the horizon as a share of the history.
        pace: the mean learning rate over the horizon against that of the recent past, where it is known. A leap carries
            noise along, and a falling rate anneals it: leaps with a recent S of .11 gained as much there as others.
    """
    return COHERENCE_GATE * math.sqrt(max(1.0, lead / SHORT_LEAD)) * min(1.0, pace)


def lowest_coherence(gram: Gram, timeline: Timeline) -> float:
    """The smaller of S and the recent S, of those that can be had; nan where neither can."""
    found = coherence(gram, timeline), recent_coherence(gram, timeline)
    return min((value for value in found if not np.isnan(value)), default=float("nan"))


def trend_lead(gram: Gram, timeline: Timeline) -> float:
    """How far ahead of the origin, as a share of the history, a trend may be carried on to be evaluated: .1 or 0."""
    return TREND_LEAD if lowest_coherence(gram, timeline) > CLEAR_COHERENCE else 0.0


def _is_average(method: Method, task: Task) -> bool:
    """Whether a method, at this horizon, gives where the run is rather than where it will be."""
    ahead = task.horizon > trend_lead(task.gram, task.timeline) * task.timeline.length + 1
    return method.averages and not (method.extrapolates and ahead)


def _decide_for_resume(method: Method, task: Task, found: Decision) -> Decision:
    """The verdict on the statistics found. The coherence speaks first: b cannot make up for a run without direction."""
    if method.averages:
        return replace(found, reason="resuming from an average puts a run back: use it for evaluation only")
    if np.isnan(found.ratio) or not task.gram.total_norm(_last_move(task.timeline)):
        return replace(found, reason="the weights have not moved since the snapshot before")
    if np.isnan(found.coherence):
        reason = "coherence S needs two snapshots in each half of the history"
        return replace(found, verdict="untestable", reason=reason)
    steady = Steadiness(found.coherence, found.recent, found.significance)
    is_steady, coherent = judge_direction(steady, task)
    found = replace(found, is_weak=not is_steady)
    missed = f"the error of the update as written is {found.expected:.2g} times the run's own move"
    objections = (
        (not is_steady, coherent),
        (found.ratio > RATIO_CEILING, f"back-test ratio b = {found.ratio:.2f}, limit {RATIO_CEILING}"),
        (found.expected > EXPECTED_CEILING, f"{missed}, limit {EXPECTED_CEILING}"),
    )
    objection = next((text for holds, text in objections if holds), None)
    return _gate(found, objection is None, objection or coherent)


@dataclass(frozen=True, slots=True)
class Needed:
    """What the coherence must exceed to resume from a forecast: S of the whole history, and S of its recent half."""

    whole: float
    recent: float


def needed_direction(steady: Steadiness, task: Task) -> Needed:
    """The limits of S for a task's horizon."""
    origin, end = task.timeline.origin, task.timeline.origin + task.horizon
    anneals = task.pace.lasts_until(origin, SPENT_RATE) >= end  # what is left of the rate takes the leap's noise away
    recent = needed_coherence(task.lead, pace=task.pace_ahead if anneals else 1.0)
    # a recent half that cannot be judged vouches for nothing
    return Needed(recent if np.isnan(steady.recent) else COHERENCE_GATE, recent)


def judge_direction(steady: Steadiness, task: Task) -> tuple[bool, str]:
    """Whether S and p allow to resume from a forecast of a task's horizon, before b is asked; and the reason in words."""
    needed = needed_direction(steady, task)
    coherent = f"coherence S = {steady.coherence:.2f}, needed {needed.whole:.2g}"
    in_recent = f"coherence S = {steady.recent:.2f} in the recent half, needed {needed.recent:.2g}"
    limit = steady.significance.limit
    objections = (
        (steady.recent <= needed.recent, in_recent),
        (not steady.coherence > needed.whole, coherent),
        (
            not steady.significance.passes,
            f"p = {steady.significance.p:.2g} of coherence S = {steady.coherence:.2f}, limit {limit:.2g}",
        ),
    )
    objection = next((text for holds, text in objections if holds), None)
    return objection is None, objection or coherent


def _last_move(timeline: Timeline) -> NDArray[np.float64]:
    """From the snapshot before to the origin, (R,)."""
    return timeline.at(timeline.origin) - timeline.at(timeline.places[-2])


def _gate(found: Decision, passed: bool, reason: str) -> Decision:  # noqa: FBT001 - the gate's own outcome
    return replace(found, verdict="forecast" if passed else "abstain", reason=reason)
