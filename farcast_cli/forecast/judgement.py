"""What `backtest` answers: every method at every horizon inside the run's own history, and the verdict at each.

And what a report adds: the direction of the run at each of its snapshots, and the back-test tensor by tensor.
"""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.forecast.backtest import (
    SHORT_LEAD,
    decide,
    judge_direction,
    needed_direction,
    pace_to,
    score,
    steadiness,
    tensor_ratios,
    untestable,
)
from farcast_cli.forecast.choice import AUTO, choose_method, usual_horizons
from farcast_cli.forecast.forecaster import Task
from farcast_cli.forecast.gram import Gram
from farcast_cli.forecast.methods import METHODS, find_method
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.forecast.words import shown_number
from farcast_cli.run.alignment import quoted
from farcast_cli.run.trajectory import MIN_SNAPSHOTS
from farcast_cli.run.trust import BY_EVIDENCE, StepRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from farcast_cli.choices import ClockName, Purpose
    from farcast_cli.forecast.backtest import Decision, Needed, Score, Steadiness
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
    rule: StepRule = BY_EVIDENCE


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
    horizons = horizons or usual_horizons(timeline)
    pace = pace_to(fitted.provenance.pace, timeline, max(horizons), wanted=clock)
    tasks = {h: _task(fitted, h, pace, purpose, anneals=clock is None, device=device) for h in horizons}
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
        fitted.rule,
    )


def _task(fitted: Fitted, horizon: int, pace: Pace, purpose: Purpose, *, anneals: bool = True, device: str) -> Task:
    gram, sample = fitted.judged()
    may_anneal = anneals and purpose == "resume"
    return Task(gram, sample, fitted.timeline, float(horizon), device=device, pace=pace, anneals=may_anneal)


@dataclass(frozen=True, slots=True)
class Direction:
    """What the run's direction allowed at one of its snapshots, had one asked there for a short leap."""

    step: int
    horizon: int
    steady: Steadiness
    needed: Needed
    is_steady: bool
    """The judgement is that of the verdict on every forecast, before the back-test ratio is asked."""
    reason: str


def direction_ahead(fitted: Fitted) -> Direction:
    """The direction at the last snapshot of the history."""
    return _direction_at(fitted, fitted.steps[-1], fitted.judged()[0])


NUM_CARRIERS = 3  # tensors of the largest share of the movement that are tried


def carrier_of(fitted: Fitted) -> str:
    """A tensor that may not be trained and without which the verdict would be another, in words; empty where there is none.

    Where the optimizer tells what is trained, no such tensor is left: see `Fitted.judged`.
    """
    gram, records = fitted.judged()[0], fitted.judged_tensors
    squares = np.trace(gram.matrix[:, :-2, :-2], axis1=1, axis2=2)
    unknown = [index for index in np.argsort(-squares) if records[index].trained is None and squares[index] > 0]
    found = direction_ahead(fitted)
    for index in unknown[:NUM_CARRIERS] if len(records) > 1 else ():
        others = np.arange(len(records)) != index
        without = _direction_at(fitted, fitted.steps[-1], gram.select(others))
        if without.is_steady != found.is_steady and math.isfinite(without.steady.coherence):
            name, share = records[index].name, squares[index] / squares.sum()
            return (
                f"{name} makes {share:.0%} of the movement and decides the verdict: S = {shown_number(found.steady.coherence)}"
                f" with it, {shown_number(without.steady.coherence)} without it; if it is a buffer and no trained weight, leave it"
                f" out: --exclude {quoted(glob.escape(name))}"
            )
    return ""


def directions(fitted: Fitted) -> tuple[Direction, ...]:
    """The direction at each snapshot from the sixth on, each time from the snapshots up to it alone.

    Takes some milliseconds for each snapshot, however many tensors there are.
    """
    gram = fitted.judged()[0]
    together = Gram(gram.steps, gram.matrix.sum(axis=0, keepdims=True))  # S and p are of all tensors together
    return tuple(_direction_at(fitted, step, together) for step in fitted.steps[MIN_SNAPSHOTS - 1 :])


def _direction_at(fitted: Fitted, step: int, gram: Gram) -> Direction:
    timeline = Timeline(gram.steps, float(step))
    horizon = max(1, round(SHORT_LEAD * timeline.length))
    pace = pace_to(fitted.provenance.pace, timeline, horizon, wanted=None)
    task = Task(gram, fitted.sample, timeline, float(horizon), pace=pace, anneals=True)
    steady = steadiness(gram, timeline)
    return Direction(step, horizon, steady, needed_direction(steady, task), *judge_direction(steady, task))


@dataclass(frozen=True, slots=True)
class TensorError:
    """A tensor, and its own ratio in the back-test; nan if it did not move."""

    name: str
    num_elements: int
    ratio: float


def tensor_errors(fitted: Fitted, method: str, horizon: int, purpose: Purpose, *, device: str) -> tuple[TensorError, ...]:
    """The back-test of one method at one horizon, tensor by tensor; none where the history cannot test it."""
    task = _task(
        fitted, horizon, pace_to(fitted.provenance.pace, fitted.timeline, horizon, wanted=None), purpose, device=device
    )
    if untestable(task):
        return ()
    records, ratios = fitted.judged_tensors, tensor_ratios(find_method(method), task)
    return tuple(
        TensorError(record.name, math.prod(record.shape), float(ratio)) for record, ratio in zip(records, ratios, strict=True)
    )
