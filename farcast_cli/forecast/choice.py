"""What `predict` chooses where the user does not: how far ahead, and by which method.

Horizons to resume from (docs/method.md): half of the history at first where its drift is clear, 1.4 times the stretch
since the last leap afterwards, and a half or a quarter where the run's own history supports no more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.forecast.backtest import SHORT_LEAD, decide, lowest_coherence, needed_coherence, trend_lead
from farcast_cli.forecast.forecaster import ANNEALING_RATE, forecast
from farcast_cli.forecast.methods import METHODS, find_method

if TYPE_CHECKING:
    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.forecaster import Method, Task
    from farcast_cli.forecast.timeline import Timeline

AUTO = "auto"
FIRST_LEAD = 0.5  # of the whole history: a leap of .7 gains little more and makes the loss jump twice as far
NEXT_LEAD = 1.4  # of the history since a leap, which is fresh
LEFT_TO_TRAIN = 0.5  # of what is left of a run: a leap over its end could not settle
USUAL_LEADS = (0.1, 0.25, 0.5, 1.0)  # of the history, where nobody names a horizon to test
PREFERENCE = 0.02  # of the cosine, by which another method must beat the default


def propose_horizon(method: Method, task: Task, purpose: Purpose, *, after_leap: bool, steps_left: int | None) -> int:
    """The longest horizon that the evidence supports; to evaluate a trend, a tenth of the history or none.

    Args:
        task: its own horizon is not looked at.
        after_leap: the history begins at a leap.
        steps_left: of the run, where the trainer's state tells.

    Returns:
        whole steps; the shortest one tried where the evidence supports none.
    """
    timeline = task.timeline
    if method.averages and purpose == "evaluation":
        return round(trend_lead(task.gram, timeline) * timeline.length) if method.extrapolates else 0
    # below what the longest leap needs, half of the history gained no more than a quarter and made the loss jump twice as far
    clear = lowest_coherence(task.gram, timeline) > needed_coherence(NEXT_LEAD)
    leads = [*([NEXT_LEAD] if after_leap else []), *([FIRST_LEAD] if after_leap or clear else []), SHORT_LEAD]
    limit = float("inf") if steps_left is None else max(1.0, steps_left * LEFT_TO_TRAIN)
    limit = min(limit, _left_to_anneal(task))
    horizon = 1
    for lead in leads:
        horizon = max(1, int(min(round(lead * timeline.length), limit)))
        if decide(method, replace(task, horizon=float(horizon)), purpose).verdict == "forecast":
            return horizon
    return horizon


def _left_to_anneal(task: Task) -> float:
    """The longest horizon after which enough of a decay is left; infinite where none is, and none is left already."""
    origin = task.timeline.origin
    until = task.pace.lasts_until(origin, ANNEALING_RATE) if task.anneals else origin
    return until - origin if until >= origin + 1 else float("inf")


def usual_horizons(timeline: Timeline) -> tuple[int, ...]:
    """Horizons to show a back-test at, in whole steps."""
    return tuple(sorted({max(1, round(lead * timeline.length)) for lead in USUAL_LEADS}))


def choose_method(name: str | None, task: Task, purpose: Purpose) -> tuple[Method, str]:
    """The method asked for; with `auto` the one that the evidence favours, and why.

    To evaluate: the forecast of later weights with the smallest back-test ratio where one passes the gate, else the
    trend. To resume from: the one whose step, made inside the history, points best along the run's own drift from there.

    Returns:
        the method, and the reason in words (empty where nothing was chosen).
    """
    default = default_method(purpose, horizon=task.horizon)
    if name != AUTO:
        return (find_method(name) if name else default), ""
    candidates = [method for method in METHODS.values() if not method.averages and method.name != "persistence"]
    if purpose == "evaluation" and not task.horizon:
        return default, "the run at the origin, because no later weights are forecast"
    if purpose == "evaluation":
        decisions = {method.name: decide(method, task, purpose) for method in candidates}
        passed = {key: d.ratio for key, d in decisions.items() if d.verdict == "forecast" and d.expected < 1}
        best = min(passed, key=lambda key: passed[key], default=None)
        if best is None:
            return METHODS["trend"], "no forecast of later weights passes its back-test"
        return METHODS[best], f"smallest back-test ratio, b = {passed[best]:.2f}"
    cosines = {method.name: drift_cosine(method, task) for method in candidates}
    best = max(cosines, key=lambda key: cosines[key])
    if not cosines[best] > cosines[default.name] + PREFERENCE:
        return default, f"no method points better along the drift (cosine {cosines[default.name]:.2f})"
    return METHODS[
        best
    ], f"its update points best along the drift, cosine {cosines[best]:.2f} ({cosines[default.name]:.2f} by {default.name})"


def default_method(purpose: Purpose, *, horizon: float | None) -> Method:
    """`blend` to resume from. To evaluate: `k5` for later weights, `trend` where no horizon is asked for."""
    if purpose == "resume":
        return METHODS["blend"]
    return METHODS["k5"] if horizon else METHODS["trend"]


def drift_cosine(method: Method, task: Task) -> float:
    """The cosine between the step made at x and the run's drift from x to s, all tensors together; nan if nothing moved.

    The drift is a least-squares slope over the snapshots from x on: it has less of the noise that no forecast can know.
    """
    inner, timeline = task.backtest(), task.timeline
    start = inner.timeline.origin
    step = forecast(method, inner)
    later = [float(place) for place in timeline.steps if start < place <= timeline.origin]
    drift = timeline.slope_over([start, *later])
    size = task.gram.total_norm(step) * task.gram.total_norm(drift)
    return float(np.einsum("kr,krs,s->", step, task.gram.matrix, drift)) / size if size else float("nan")
