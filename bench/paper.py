"""The paper's method in its own setting: many short regressions by SGD, and a small DistilBERT; error by lead, and cost.

Knows how the paper's layer is fitted, against how farcast fits it. The paper fits one layer on the first and the last
weight of other runs, whose later weights are known, and applies it to a run that has stopped at the same step. farcast
has no other runs: its `lfd2` is fitted inside the run's own history.

Source of the setting: arXiv 2505.02714 (two-dimensional linear regression by SGD; DistilBERT). What the text that could
be had does not say is our choice: rates, noise, data, and how many steps.

Shapes: K tensors, M weights, T snapshots, R = T + 1 basis vectors (see farcast's gram.py), G runs that are judged.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import training

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.forecast.fitting import fit as fit_run
from farcast_cli.forecast.forecaster import Options, Task, forecast
from farcast_cli.forecast.gram import Gram, Sample
from farcast_cli.forecast.lfd2 import fit_lfd2
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.run.steps import StepRange
from farcast_cli.run.trajectory import discover

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from store import Cell
    from tasks import Spec

    from farcast_cli.choices import Scope

    Forecaster = Callable[["Runs", float], NDArray[np.float64]]

LEADS = (0.04, 0.12, 0.24, 0.48, 1.0)  # whole snapshots, both here and there
COST_LEAD = 0.48
OURS = ("persistence", "line", "line-fit", "k5", "blend", "drift", "rank-1")
GRAD_WEIGHTS = (0.0, 1.0, 10.0)
RATE_FACTORS = (0.2, 1.0, 5.0)  # of 0.01: at the origin 33 %, 87 % and all of the way is behind
NOISES = (0.1, 0.3, 1.0)  # of the data, whose signal has a variance of 2
NUM_KNOWN, NUM_TESTED, NUM_POINTS = 200, 40, 100
REPEATS = 5
OTHER_RUNS = "other runs"


@dataclass(frozen=True)
class Runs:
    """Runs that have stopped half-way, and what came after: `basis` (M, R), rows of the judged runs from `starts` (G,)."""

    gram: Gram
    sample: Sample
    basis: NDArray[np.float64]
    bounds: NDArray[np.int64]
    starts: NDArray[np.int64]
    scope: Scope  # of `lfd2`, so that it is fitted on each run alone

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.gram.steps, float(self.gram.steps[-1]) / 2)

    def horizon(self, lead: float) -> float:
        return round(lead * self.timeline.length)

    def apply(self, step: NDArray[np.float64]) -> NDArray[np.float64]:
        """The step of each weight, (M,), from coefficients (K, R) or (1, R)."""
        each = np.broadcast_to(step, (len(self.bounds) - 1, self.basis.shape[1]))
        pairs = zip(np.split(self.basis, self.bounds[1:-1]), each, strict=True)
        return np.concatenate([rows @ coefficients for rows, coefficients in pairs])

    @cached_property
    def visible(self) -> NDArray[np.bool_]:
        """The basis vectors that the origin can see, (R,)."""
        return np.concatenate([self.gram.steps[1:] <= self.timeline.origin, [True, True]])


# --- forecasters: runs and a lead to the step of each weight ---------------------------------------------------------


def from_history(method: str, grad_weight: float, runs: Runs, lead: float) -> NDArray[np.float64]:
    """A method as farcast has it: from the run's own history."""
    options = Options(scope=runs.scope if method == "lfd2" else "auto", grad_weight=grad_weight)
    task = Task(runs.gram, runs.sample, runs.timeline, runs.horizon(lead), options)
    return runs.apply(forecast(METHODS[method], task))


def from_other_runs(others: Runs, grad_weight: float, runs: Runs, lead: float) -> NDArray[np.float64]:
    """The paper's: the layer that leads from the first and the last weights of other runs to their later ones."""
    origin = others.timeline.origin
    later = Timeline(others.gram.steps, origin + others.horizon(lead))
    step = fit_lfd2(others.sample, later, origin, grad_weight=grad_weight, per_tensor=False)
    return runs.apply(step[:1] * runs.visible)  # as a step from the later weights; ours starts where the run has stopped


def by_history() -> dict[str, Forecaster]:
    """What farcast makes of the run alone, by label."""
    found = {name: partial(from_history, name, 0.0) for name in OURS}
    return {**found, **{_label("own history", weight): partial(from_history, "lfd2", weight) for weight in GRAD_WEIGHTS}}


def by_other_runs(others: dict[str, Runs]) -> dict[str, Forecaster]:
    """The paper's layer by label; of the first kind of other runs with every weight of L_grad."""
    first = next(iter(others))
    pairs = [(kind, weight) for kind in others for weight in (GRAD_WEIGHTS if kind == first else GRAD_WEIGHTS[:1])]
    return {_label(kind, weight): partial(from_other_runs, others[kind], weight) for kind, weight in pairs}


def _label(fitted_on: str, grad_weight: float) -> str:
    return f"lfd2, {fitted_on}" + (f", L_grad {grad_weight:g}" if grad_weight else "")


# --- error and cost --------------------------------------------------------------------------------------------------


def errors(runs: Runs, others: dict[str, Runs]) -> list[dict[str, Any]]:
    """||w_hat - w|| / ||w_last - w||, median over runs, and mean |w_hat - w|, of every forecaster at every lead."""
    rows = []
    for lead in LEADS:
        later = Timeline(runs.gram.steps, runs.timeline.origin + runs.horizon(lead))
        truth = runs.apply(later.at(later.origin)[None] * ~runs.visible)
        for label, forecaster in {**by_history(), **by_other_runs(others)}.items():
            missed = forecaster(runs, lead) - truth
            ratios = np.sqrt(np.add.reduceat(missed**2, runs.starts) / np.add.reduceat(truth**2, runs.starts))
            mae = float(np.abs(missed).mean())
            rows.append({"method": label, "lead": lead, "ratio": float(np.median(ratios)), "mae": mae})
    return rows


def costs(run: Runs, others: dict[str, Runs], fit: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of a fit and a forecast for one run, all methods in turn; the median of some rounds.

    farcast's `fit` comes before each of its methods and counts for each. What the other runs cost to train does not count.
    """
    work = {**by_history(), **by_other_runs(others)}
    rounds = []
    for _ in range(REPEATS):
        fit_s = _cpu_s(fit)
        used = {label: _cpu_s(partial(forecaster, run, COST_LEAD)) for label, forecaster in work.items()}
        rounds.append({label: spent + (fit_s if label in by_history() else 0.0) for label, spent in used.items()})
    return {label: float(np.median([each[label] for each in rounds])) for label in work}


def _cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


# --- the regressions -------------------------------------------------------------------------------------------------


def regression(cell: Cell) -> dict[str, Any]:
    """Linear regressions with two weights by SGD, at some rates and noise levels; the layer is fitted on other runs."""
    rng = np.random.default_rng(cell.spec.seed)
    settings = [(factor * cell.spec.lr, noise) for factor in RATE_FACTORS for noise in NOISES]
    known = {setting: sgd(cell.spec, setting, NUM_KNOWN, rng) for setting in settings}
    everything = side_by_side(np.concatenate(list(known.values())))
    rows = []
    for setting in settings:
        tested = sgd(cell.spec, setting, NUM_TESTED, rng)
        others = {OTHER_RUNS: side_by_side(known[setting]), "other runs of all settings": everything}
        named = dict(zip(("rate", "noise"), setting, strict=True))
        rows += [named | row for row in errors(side_by_side(tested), others)]
    alone = tested[:1]
    return {"rows": rows, "cpu_s": costs(side_by_side(alone), others, partial(side_by_side, alone))}


def sgd(spec: Spec, setting: tuple[float, float], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The snapshots (count, 2, T) of as many regressions, each on data of its own and from a start of its own."""
    rate, noise = setting
    inputs = rng.standard_normal((count, NUM_POINTS, 2))
    truth, weights = rng.standard_normal((2, count, 2))
    outputs = np.einsum("knd,kd->kn", inputs, truth) + noise * rng.standard_normal((count, NUM_POINTS))
    each, snapshots = np.arange(count)[:, None], [weights]
    for step in range(1, spec.steps + 1):
        drawn = rng.integers(NUM_POINTS, size=(count, spec.batch))
        x, y = inputs[each, drawn], outputs[each, drawn]
        weights = weights - rate * np.einsum("kb,kbd->kd", np.einsum("kbd,kd->kb", x, weights) - y, x) / spec.batch
        if step % (spec.steps // training.SNAPSHOTS) == 0:
            snapshots.append(weights)
    return np.stack(snapshots, axis=2)


def side_by_side(weights: NDArray[np.float64]) -> Runs:
    """Runs (K, N, T) as the tensors of one, so that each is fitted alone."""
    count, size, num_snapshots = weights.shape
    basis = np.concatenate([np.diff(weights), weights[:, :, :1], np.ones((count, size, 1))], axis=2)
    bounds = np.arange(count + 1) * size
    gram = Gram(np.arange(num_snapshots), basis.transpose(0, 2, 1) @ basis)
    sample = Sample(weights.reshape(-1, num_snapshots).astype(np.float32), bounds, np.full(count, size))
    return Runs(gram, sample, basis.reshape(count * size, -1), bounds, starts=bounds[:-1], scope="tensor")


# --- DistilBERT ------------------------------------------------------------------------------------------------------


def distilbert(cell: Cell) -> dict[str, Any]:
    """The small DistilBERT; the layer is fitted on the run of another seed."""
    run, others = stored(cell.spec), {OTHER_RUNS: stored(other_seed(cell.spec))}
    seen = discover(training.run_folder(cell.spec), steps=StepRange(last=round(run.timeline.origin)))
    return {"rows": errors(run, others), "cpu_s": costs(run, others, partial(fit_run, seen, num_samples=DEFAULT_SAMPLE))}


def other_seed(spec: Spec) -> Spec:
    return replace(spec, seed=1 - spec.seed)


def stored(spec: Spec) -> Runs:
    """A run of the bench, with all of its weights."""
    fitted = training.fitted(spec)
    files = [training.read_weights(training.run_folder(spec) / record.path) for record in fitted.provenance.snapshots]
    names = [record.name for record in fitted.provenance.tensors]
    weights = np.stack([np.concatenate([file[name].double().numpy().ravel() for name in names]) for file in files], axis=1)
    basis = np.concatenate([np.diff(weights), weights[:, :1], np.ones((len(weights), 1))], axis=1)
    bounds = np.concatenate([[0], np.cumsum([files[0][name].numel() for name in names])])
    return Runs(*(fitted.gram, fitted.sample, basis, bounds), starts=np.zeros(1, np.int64), scope="auto")
