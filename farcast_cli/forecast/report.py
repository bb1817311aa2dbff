"""What `backtest` answers: every method at every horizon inside the run's own history, and the verdict at each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.forecast.backtest import SHORT_LEAD, decide, judge_direction, pace_to, score
from farcast_cli.forecast.choice import AUTO, choose_method, usual_horizons
from farcast_cli.forecast.forecaster import Task
from farcast_cli.forecast.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from farcast_cli.choices import ClockName, Purpose
    from farcast_cli.forecast.backtest import Decision, Score, Steadiness
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.run.pace import Pace


@dataclass(frozen=True, slots=True)
class BacktestReport:
    """What forecasts would have been worth at the last snapshot of a history."""

    origin_step: int
    steady: Steadiness
    scores: tuple[Score, ...]
    decisions: Mapping[int, tuple[str, Decision]]
    """By horizon: a method, and the verdict on it."""
    pace: Pace
    reasons: tuple[str, ...]
    """Why `auto` chose as it did."""


def report_backtest(
    fitted: Fitted, horizons: Sequence[int], *, method: str | None, purpose: Purpose, clock: ClockName | None, device: str
) -> BacktestReport:
    """Judge the methods of a fitted run.

    Args:
        horizons: some shares of the history where there are none.
        method: a name, or `auto`; the default for the purpose if None. Every method is scored unless one is named.

    Raises:
        UsageError: no such method.
    """
    timeline = fitted.timeline
    gram, sample = fitted.judged()
    horizons = horizons or usual_horizons(timeline)
    pace = pace_to(fitted.provenance.pace, timeline, max(horizons), wanted=clock)
    anneals = purpose == "resume" and clock is None
    tasks = {h: Task(gram, sample, timeline, float(h), device=device, pace=pace, anneals=anneals) for h in horizons}
    chosen = {h: choose_method(method, task, purpose) for h, task in tasks.items()}
    decisions = {h: (chosen[h][0].name, decide(chosen[h][0], task, purpose)) for h, task in tasks.items()}
    shown = METHODS.values() if method in {None, AUTO} else {found.name: found for found, _ in chosen.values()}.values()
    return BacktestReport(
        fitted.steps[-1],
        fitted.steadiness(),
        tuple(score(list(shown), tasks[horizons[0]], horizons)),
        decisions,
        pace,
        tuple(dict.fromkeys(why for _, why in chosen.values() if why)),
    )


def direction_ahead(fitted: Fitted) -> tuple[int, bool, str]:
    """A short horizon, and whether the run's direction is steady enough to resume from a forecast of it; with the reason.

    The judgement is that of the verdict on every forecast, before the back-test ratio is asked.
    """
    timeline = fitted.timeline
    gram, sample = fitted.judged()
    horizon = max(1, round(SHORT_LEAD * timeline.length))
    pace = pace_to(fitted.provenance.pace, timeline, horizon, wanted=None)
    task = Task(gram, sample, timeline, float(horizon), pace=pace, anneals=True)
    return horizon, *judge_direction(fitted.steadiness(), task)
