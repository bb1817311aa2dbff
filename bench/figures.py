"""The figures of the report: from curves and losses to shares, gains and correlations. Knows no tables."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from store import Cell
    from tasks import Spec

TARGETS = (0.5, 0.75, 1.0)  # of the plain run's steps: its loss there is what others are to reach
NEVER = 1.05  # what counts as the number of steps where a target is never reached, in runs
FIT_REACH = 2.2  # resumed stretches over which the plain curve is fitted
HARMFUL, MISSED = -0.03, 0.05  # gains under which a kept forecast did harm, over which an abstention missed something
TELLING = 0.01  # of the whole run's loss: what a control must lose by the skipped steps for R to be given
Results = dict["Cell", dict[str, Any]]


# --- resuming --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """One forecast that was resumed from, against the plain run over the same steps."""

    spec: Spec
    origin: float
    lead: float
    method: str
    ahead: float  # steps ahead as a share of the horizon; nan where the plain run no longer falls
    gain: float  # relative, of the loss of the averaged weights
    at_once: float  # loss right after the leap, relative to the last snapshot's
    verdict: str  # of the gate on `blend` there, with its statistics
    coherence: float
    recent: float
    ratio: float

    @property
    def kept(self) -> bool:
        return self.verdict == "forecast"


def resumed(results: Results) -> list[Resumed]:
    """All resumed forecasts whose plain run and control are there."""
    plain = {cell.spec: result for cell, result in results.items() if cell.kind == "plain"}
    gates = gate_rows(results)
    controls = {(c.spec, c.origin): r for c, r in results.items() if c.kind == "resume" and c.method == "persistence"}
    found = []
    for cell, result in results.items():
        control, gate = controls.get((cell.spec, cell.origin)), gates.get((cell.spec, cell.origin, cell.lead))
        if cell.kind == "resume" and cell.method != "persistence" and cell.spec in plain and control and gate:
            found.append(_compared(cell, result, control, plain[cell.spec]["curve"], gate))
    return found


def gate_rows(results: Results) -> dict[tuple[Spec, float, float], dict[str, Any]]:
    """What the gate said on `blend`, by run, origin and lead."""
    return {
        (cell.spec, row["origin"], row["lead"]): row
        for cell, result in results.items()
        if cell.kind == "ratio"
        for row in result["rows"]
        if row["method"] == "blend"
    }


def _compared(
    cell: Cell, result: dict[str, Any], control: dict[str, Any], curve: Sequence[Any], gate: dict[str, Any]
) -> Resumed:
    return Resumed(
        cell.spec,
        cell.origin,
        cell.lead,
        cell.method,
        ahead=steps_ahead(curve, result, control),
        gain=1 - result["averaged"] / control["averaged"],
        at_once=result["at_once"] / control["at_once"] - 1,
        verdict=gate["verdict"],
        coherence=gate["S"],
        recent=gate["S_recent"],
        ratio=gate["b"],
    )


def steps_ahead(curve: Sequence[Any], result: dict[str, Any], control: dict[str, Any]) -> float:
    """How many steps a resumed forecast is ahead of its control, in horizons; nan where the plain run no longer falls."""
    difference = np.mean([value for _, value in result["points"]]) - np.mean([value for _, value in control["points"]])
    slope = _slope(curve, result["origin"], [step for step, _ in result["points"]])
    return float(difference / slope / result["horizon"]) if slope < 0 else math.nan


def _slope(curve: Sequence[Any], origin: int, steps: Sequence[int]) -> float:
    """Loss per step of the plain run in the middle of some steps, from a parabola in the logarithm of the step."""
    last = origin + FIT_REACH * (steps[-1] - origin)
    near = [(step, raw) for step, raw, _ in curve if origin <= step <= last]
    middle = float(np.mean(steps))
    parabola = np.polyfit([math.log(step + 1) for step, _ in near], [raw for _, raw in near], 2)
    return float(np.polyval(np.polyder(parabola), math.log(middle + 1)) / (middle + 1))


# --- one leap under a schedule ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Annealed:
    """One leap whose run was trained to the end of its schedule, against the control and the whole run."""

    spec: Spec
    origin: float
    lead: float
    replaced: float  # R; nan where the control lost nothing that could be told from noise
    random: float  # R of a random direction with the same norms
    kept: bool  # at this horizon, by the default
    chosen: float  # by the default without a horizon: steps as a share of the run, 0 where it abstained


def annealed(results: Results) -> list[Annealed]:
    """All leaps under a schedule whose control and whole run are there."""
    full = {cell.spec: result["curve"][-1][1] for cell, result in results.items() if cell.kind == "plain"}
    ones = {(c.spec, c.origin, c.lead, c.method): r for c, r in results.items() if c.kind == "anneal"}
    found = []
    for (spec, origin, lead, method), result in ones.items():
        control, random = (ones.get((spec, origin, lead, other)) for other in ("control", "random"))
        if method == "forecast" and control and spec in full:
            default = result["default"]
            found.append(Annealed(
                spec, origin, lead,
                replaced=replaced(result["final"], control["final"], full[spec]),
                random=replaced(random["final"], control["final"], full[spec]) if random else math.nan,
                kept=result["said"]["verdict"] == "forecast",
                chosen=default["horizon"] / spec.steps if default["verdict"] == "forecast" else 0.0,
            ))  # fmt: skip
    return found


def replaced(forecast: float, control: float, full: float) -> float:
    """R = (control - forecast) / (control - full), from losses at the end of a schedule; nan where the control is as good."""
    return (control - forecast) / (control - full) if control > (1 + TELLING) * full else math.nan


# --- whole runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """Steps to the plain run's losses as a share of its own, raw and on averaged weights, and where it ended."""

    raw: float
    average: float
    missed: int  # of the six targets, how many were never reached
    leaps: int
    final: float
    final_average: float


def whole(curve: Sequence[Any], plain: Sequence[Any], num_leaps: int = 0) -> Whole:
    steps = [step for step, _, _ in plain]
    smooth = _smooth([raw for _, raw, _ in plain])
    targets = [smooth[round(share * (len(steps) - 1))] for share in TARGETS]
    own = [_first(steps, smooth, target)[0] for target in targets]
    there = [step for step, _, _ in curve]
    series = _smooth([raw for _, raw, _ in curve]), [average for _, _, average in curve]
    hits = [[_first(there, values, target) for target in targets] for values in series]
    raw, average = (float(np.mean([hit[0] / step for hit, step in zip(each, own, strict=True)])) for each in hits)
    missed = sum(not reached for each in hits for _, reached in each)
    return Whole(raw, average, missed, num_leaps, series[0][-1], series[1][-1])


def _smooth(values: Sequence[float]) -> list[float]:
    """Means of three neighbours; of two at the ends."""
    return [float(np.mean(values[max(0, index - 1) : index + 2])) for index in range(len(values))]


def _first(steps: Sequence[int], values: Sequence[float], target: float) -> tuple[float, bool]:
    """The first step whose value is at or below the target, and whether there is one."""
    for step, value in zip(steps, values, strict=True):
        if value <= target:
            return float(step), True
    return NEVER * steps[-1], False


# --- statistics ------------------------------------------------------------------------------------------------------


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; nan with fewer than three pairs that are both finite."""
    pairs = np.array([pair for pair in zip(first, second, strict=True) if all(map(_finite, pair))])
    if len(pairs) < 3:
        return math.nan
    ranks = pairs.argsort(axis=0).argsort(axis=0)  # ties are as good as never there
    return float(np.corrcoef(ranks.T)[0, 1])


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def grouped(items: Sequence[Any], key: Any) -> dict[Any, list[Any]]:
    """Items by a key, in the order in which the keys first occur."""
    found: defaultdict[Any, list[Any]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)
