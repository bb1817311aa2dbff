"""What a forecasting method is: a step from the last snapshot as coefficients over the Gram basis.

A method is a function of a `Task` (a history, an origin, a horizon) and returns the step w_hat - w_s as coefficients
(K, R): algebra on the statistic, never on tensors. Here a method's step is thinned and its norm set; methods.py has
the methods themselves.

Shapes: K tensors, R = T + 1 basis vectors (see gram.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.forecast.timeline import Timeline, evenly
from farcast_cli.run.pace import STEPS, Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from farcast_cli.choices import Scope, StepNorm
    from farcast_cli.forecast.gram import Gram, Sample


ANNEALING_RATE = 0.25  # of the highest: leaps that ended at a lower one replaced less of the training that they skipped
LONGEST_IN_FULL = 0.5  # of the history; longer leaps were no better in full length, and one of 1.5 of it was worse
DRIFT_WINDOW = 2.0  # times the horizon: a longer one overshoots where a run slows down
MAX_MATCH = 3.0  # bf16 moves below one ulp once asked for a factor of 22: noise


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose of a method. `step_norm` None leaves it to the method."""

    step_norm: StepNorm | None = None
    scale: float = 1.0
    scope: Scope = "auto"
    grad_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """Forecast `horizon` steps ahead of the timeline's origin."""

    gram: Gram
    sample: Sample
    timeline: Timeline
    horizon: float
    options: Options = field(default_factory=Options)
    device: str = "cpu"
    pace: Pace = STEPS
    anneals: bool = False
    """Training goes on from the forecast: it is written in full length while enough of a decay is left to take it back."""

    @property
    def lead(self) -> float:
        """The horizon over the history's length: r = h / L."""
        return self.horizon / self.timeline.length

    @property
    def drift_window(self) -> float:
        """How far back a drift is measured, l = min(L, 2 h)."""
        return min(self.timeline.length, DRIFT_WINDOW * self.horizon)

    @property
    def pace_ahead(self) -> float:
        """How fast the run moves over the horizon, against its recent past.

            pace = (mean rate over [s, s + h]) / (mean rate over [s - l, s]),   l = min(L, 2 h),   at most 3

        Exactly 1 where the rate is constant, or steps are counted, or a rate is not known.
        """
        origin = self.timeline.origin
        past, ahead = (origin - self.drift_window, origin), (origin, origin + self.horizon)
        known = self.horizon > 0 and self.pace.covers(past[0], ahead[1])
        return self.pace.scale(past, ahead) if known else 1.0

    @property
    def reach(self) -> float:
        """The horizon in steps of the recent past, h -> h pace: h where the rate stays, fewer where it falls."""
        return self.horizon * self.pace_ahead

    @property
    def length_pace(self) -> Pace:
        """The clock of the step as it is written, where b is judged by `pace`.

        To resume from, a step of up to half the history keeps its full length while the rate at its end is a quarter of the
        highest so far: the decay that is left anneals what is too long, and the run ends lower (measured, docs/method.md).
        """
        origin = self.timeline.origin
        is_short = self.horizon <= LONGEST_IN_FULL * self.timeline.length + 1  # a horizon is a whole number
        lasts = self.anneals and self.pace.lasts_until(origin, ANNEALING_RATE) >= origin + self.horizon
        return STEPS if is_short and lasts else self.pace

    @property
    def length_factor(self) -> float:
        """What the pace multiplies the step's length by, as it is written."""
        return 1.0 if self.length_pace is STEPS else self.pace_ahead

    @property
    def training_origin(self) -> float:
        """Where the training of a forecaster ends: from there to s lies the same lead as from s to the forecast.

        x = t_0 + L / (1 + r)
        """
        return self.timeline.first + self.timeline.length / (1 + self.lead)

    @property
    def matched_move(self) -> NDArray[np.float64]:
        """w(s) - w(x), (R,): the past move that the forecast is likened to."""
        return self.timeline.at(self.timeline.origin) - self.timeline.at(self.training_origin)

    def backtest(self) -> Task:
        """The same task inside the history: from x to s, where the truth is known.

        Where x lies behind the last snapshot before s, that snapshot takes its place: w(x) is interpolated between
        the two, and a test that started there would have seen part of the truth.
        """
        timeline = self.timeline
        start = min(self.training_origin, float(timeline.steps[max(0, timeline.num_snapshots - 2)]))
        return replace(self, timeline=timeline.before(start), horizon=timeline.origin - start)


@dataclass(frozen=True, slots=True)
class Method:
    """A forecasting method: its step, how the step's norm is set by default, and a line for people.

    `averages` marks one that does not aim at later weights: the back-test cannot judge it, and to resume from it would
    put a run back. `extrapolates` marks one of these that the horizon carries on beyond what it averages.
    """

    name: str
    step: Callable[[Task], NDArray[np.float64]]
    step_norm: StepNorm
    summary: str
    max_context: int | None = None
    averages: bool = False
    extrapolates: bool = False


def forecast(method: Method, task: Task) -> NDArray[np.float64]:
    """The step (K, R) of a method with its norm set and scaled as the task's options ask."""
    norm = task.options.step_norm or method.step_norm
    task = replace(task, pace=task.length_pace)
    return set_step_norm(plain_step(method, task), task, norm) * task.options.scale


def plain_step(method: Method, task: Task) -> NDArray[np.float64]:
    """The step (K, R) as the method gives it, from no more snapshots than it needs: each is one file to read."""
    visible = task.timeline.num_snapshots
    if method.max_context is None or visible <= method.max_context:
        return method.step(task)
    keep = evenly(visible, method.max_context)
    if visible < task.gram.num_snapshots:
        keep.append(visible)  # an origin between snapshots is interpolated towards the next one
    thinned = replace(
        task,
        gram=task.gram.restrict(keep),
        sample=task.sample.restrict(keep),
        timeline=Timeline(task.gram.steps[keep], task.timeline.origin),
    )
    return method.step(thinned) @ task.gram.change_of_basis(keep)


def set_step_norm(step: NDArray[np.float64], task: Task, norm: StepNorm) -> NDArray[np.float64]:
    """Scale each tensor's step by its past move m = ||w(s) - w(x)||.

        match        Delta min(m (1 + r) / ||Delta||, 3)   least squares shrinks a step; this undoes it
        match-plain  Delta min(m / ||Delta||, 3)
        clip         Delta min(m / ||Delta||, 1)
        free         Delta

    Before, m -> m pace, which is 1 unless the learning rate changes (`Task.pace_ahead`); `free` is left alone.
    The matched window is h / (1 + r) long, hence the factor (1 + r): without it a straight path is under-shot.
    """
    if norm == "free":
        return step
    move = task.gram.norms(task.matched_move) * (1 + task.lead if norm == "match" else 1.0) * task.pace_ahead
    size = task.gram.norms(step)
    factor = np.divide(move, size, out=np.zeros_like(move), where=size > 0)
    limit = 1.0 if norm == "clip" else MAX_MATCH
    return step * np.minimum(factor, limit)[:, None]
