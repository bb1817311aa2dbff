"""What is measured on one run at one origin: the error of forecasts, what resuming from them gains, what they score."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import torch
import training

from farcast_cli.forecast.backtest import backtest_ratio, decide
from farcast_cli.forecast.forecaster import Options, Task, forecast
from farcast_cli.forecast.methods import METHODS
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.prediction import predict
from farcast_cli.request import Request

if TYPE_CHECKING:
    import numpy as np
    from store import Cell

    from farcast_cli.forecast.forecaster_file import Fitted

RATIO_ORIGINS = (0.2, 0.4, 0.5, 0.7)
RATIO_LEADS = (0.1, 0.25, 0.5)
GATE_LEADS = (*RATIO_LEADS, 1.0)
LFD2_TESTED = 0.25  # the one lead at which the back-test of `lfd2` is made
RESUMED = 0.1  # of the run
MAX_RESUMED_GPT = 200  # steps
RESUME_EVALUATIONS = 15  # of which the last third is used
RESUME_METHODS: dict[str, tuple[str, Options]] = {
    "persistence": ("persistence", Options()),
    "blend": ("blend", Options()),
    "drift": ("drift", Options()),
    "k5-match": ("k5", Options("match")),
    "line": ("line", Options()),
    "lfd2": ("lfd2", Options()),
    "average-extrapolate": ("average-extrapolate", Options()),
    "average": ("average", Options()),
    "random": ("blend", Options()),
}
EVALUATED = ("average", "accelerate", "average-extrapolate", "k5")
EVALUATION_LEAD = 0.1


# --- the error of the weights ----------------------------------------------------------------------------------------


def ratio(cell: Cell) -> dict[str, Any]:
    """Error and b of every method, and the verdict on `blend`, at every origin and lead: algebra on one Gram matrix."""
    fitted = training.fitted(cell.spec)
    gram, sample = fitted.judged()
    rows = []
    for share in RATIO_ORIGINS:
        timeline = Timeline(fitted.gram.steps, share * cell.spec.steps)
        for lead in GATE_LEADS:
            task = Task(gram, sample, timeline, _whole_snapshots(fitted, lead * timeline.length))
            rows += _ratios(task, origin=share, lead=lead)
    return {"rows": rows}


def _ratios(task: Task, *, origin: float, lead: float) -> list[dict[str, Any]]:
    decision = decide(METHODS["blend"], task, "resume")
    row = {"origin": origin, "lead": lead, "verdict": decision.verdict, "S": decision.coherence, "b": decision.ratio}
    row["S_recent"] = getattr(decision, "recent", math.nan)
    if lead not in RATIO_LEADS or task.timeline.origin + task.horizon > task.gram.steps[-1]:
        return [row | {"method": "blend", "ratio": None}]
    rows = []
    for name, method in METHODS.items():
        for scope in ("global", "tensor") if name == "lfd2" else ("auto",):
            scoped = replace(task, options=Options(scope=scope))
            # a fit of lfd2 takes a second, of the others a thousandth
            tested = backtest_ratio(method, scoped) if name != "lfd2" or lead == LFD2_TESTED else None
            label = f"{name}, {scope}" if name == "lfd2" else name
            rows.append(row | {"method": label, "b": tested, "ratio": _error(scoped, forecast(method, scoped))})
    return rows


def _error(task: Task, step: np.ndarray) -> float:
    """||w_hat - w|| / ||w_last - w|| against the run's own later snapshot."""
    later = Timeline(task.timeline.steps, task.timeline.origin + task.horizon)
    truth = later.at(later.origin) - later.at(task.timeline.origin)
    return task.gram.total_norm(step - truth) / task.gram.total_norm(truth)


def _whole_snapshots(fitted: Fitted, horizon: float) -> float:
    """The nearest horizon at which there is a snapshot: between two the truth would be a guess."""
    distance = fitted.steps[1] - fitted.steps[0]
    return float(max(1, round(horizon / distance)) * distance)


# --- resuming --------------------------------------------------------------------------------------------------------


def resume(cell: Cell) -> dict[str, Any]:
    """Train on from a forecast, with the optimiser's state and the batches that the plain run had at those steps."""
    spec, task = cell.spec, training.open_task(cell.spec)
    origin = round(cell.origin * spec.steps)
    state = torch.load(training.state_file(spec, origin), weights_only=True)
    horizon = max(1, round(cell.lead * origin))
    task.set(_forecast_weights(cell, origin, horizon, state["model"]))
    task.optimizer.load_state_dict(state["optimizer"])
    at_once, points, averaged = task.val(), [], []
    count = resumed_steps(cell)
    for step in range(origin, origin + count):
        task.step(step)
        done = step + 1 - origin
        if 3 * done > 2 * count:
            averaged.append(task.get())
            if done % (count // RESUME_EVALUATIONS) == 0:
                points.append((step + 1, task.val()))
    return {
        "origin": origin,
        "horizon": horizon,
        "at_once": at_once,
        "points": points,
        "averaged": training.loss_of(task, training.mean(averaged)),
    }


def resumed_steps(cell: Cell) -> int:
    count = round(RESUMED * cell.spec.steps)
    return count if cell.spec.task in {"mlp", "conv"} else min(count, MAX_RESUMED_GPT)


def _forecast_weights(cell: Cell, origin: int, horizon: int, last: training.Weights) -> training.Weights:
    method, options = RESUME_METHODS[cell.method]
    written = _write(cell, Request((horizon,), method=method, options=options, origin_step=origin, even_if_worse=True))
    return randomised(written, last, seed=origin + horizon) if cell.method == "random" else written


def _write(cell: Cell, request: Request) -> training.Weights:
    """The forecast as farcast writes it."""
    with tempfile.TemporaryDirectory() as folder:
        fitted = training.fitted(cell.spec)
        outcome = predict(fitted, replace(request, output=f"{folder}/"), lambda _what, _total: lambda _done: None)[0]
        return training.read_weights(Path(str(outcome.path)))


def randomised(weights: training.Weights, last: training.Weights, *, seed: int) -> training.Weights:
    """Random directions in place of a forecast's, each tensor's step as long as it was."""
    norms = {name: float((value - last[name]).norm()) for name, value in weights.items()}
    return random_step(last, norms, seed=seed)


def random_step(last: training.Weights, norms: dict[str, float], *, seed: int) -> training.Weights:
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, value in last.items():
        direction = torch.randn(value.shape, generator=generator)
        found[name] = value + direction * norms[name] / direction.norm()
    return found


# --- evaluating ------------------------------------------------------------------------------------------------------


def evaluation(cell: Cell) -> dict[str, Any]:
    """Validation loss at once of what is meant to be evaluated or shipped."""
    spec, task = cell.spec, training.open_task(cell.spec)
    origin = round(cell.origin * spec.steps)
    last = training.snapshot_file(spec, origin)
    losses = {"last snapshot": training.loss_of(task, training.read_weights(last))}
    for method in EVALUATED:
        request = Request((round(EVALUATION_LEAD * origin),), "evaluation", method, origin_step=origin, even_if_worse=True)
        losses[method] = training.loss_of(task, _write(cell, request))
    chosen = _default_for_evaluation(cell, origin)
    path = chosen.pop("path")
    losses["default"] = training.loss_of(task, path) if path else losses["last snapshot"]
    return {"losses": losses, "default": chosen}


def _default_for_evaluation(cell: Cell, origin: int) -> dict[str, Any]:
    """What `farcast predict --for evaluation` writes by itself; where it abstains, the last snapshot is what there is."""
    with tempfile.TemporaryDirectory() as folder:
        where = ("--forecaster", training.fit_file(cell.spec), "--origin", origin, "-o", f"{folder}/")
        said = command.predict(*where, "--for", "evaluation")
        keys = ("method", "horizon", "verdict", "ratio", "coherence")
        weights = training.read_weights(said["path"]) if said.get("path") else None
        return {key: said.get(key) for key in keys} | {"path": weights}
