"""One leap under a schedule, with the counters moved: how much of the training that it skips it replaces.

The run's snapshots hold model, optimiser and one of torch's schedules, as a loop saves them. From an origin `farcast
predict --counters advance --even-if-worse` writes a forecast with the default method, and training goes on from it, at
the rates and with the batches of the steps after it, to the END of the schedule. The control is `--method persistence`:
the counters are moved and the weights are not. `random` has the forecast's norm per tensor and a random direction.

R = (final loss of the control - of the forecast) / (final loss of the control - of the full run). 1: the skipped training is
replaced; 0: the leap was worth nothing.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

import command
import torch
import training
from cells import randomised

if TYPE_CHECKING:
    from store import Cell

ORIGINS = (0.3, 0.5, 0.7)  # of the run
LEADS = (0.25, 0.5)  # of the origin
LATEST = 0.9  # of the run: what is trained after a leap that lands later is too little to tell
FORECAST, CONTROL, RANDOM = "forecast", "control", "random"
METHODS = (FORECAST, CONTROL, RANDOM)
SAID = ("method", "horizon", "verdict", "ratio", "expected_ratio", "coherence", "recent_coherence", "p", "reason")
PLACES = tuple((origin, lead) for origin in ORIGINS for lead in LEADS if origin * (1 + lead) < LATEST)


def anneal(cell: Cell) -> dict[str, Any]:
    """Train on from what farcast writes, to the end of the schedule; `default` is what it says without a horizon."""
    spec, task = cell.spec, training.open_task(cell.spec)
    origin = round(cell.origin * spec.steps)
    horizon = round(cell.lead * origin)
    last = training.read_weights(training.snapshot_file(spec, origin))
    with tempfile.TemporaryDirectory() as folder:
        where = ("--forecaster", training.fit_file(spec), "--origin", origin, "--counters", "advance")
        method = ("--method", "persistence") if cell.method == CONTROL else ()
        asked = ("--horizon", horizon, "--even-if-worse", *method, "-o", f"{folder}/")
        said, default = command.predict(*where, *asked), command.predict(*where, "--dry-run")
        state = torch.load(said["path"], weights_only=True)
    task.set(randomised(state["model"], last, seed=origin + horizon) if cell.method == RANDOM else state["model"])
    task.optimizer.load_state_dict(state["optimizer"])
    at_once = task.val()
    for step in range(origin + horizon, spec.steps):
        task.step(step)
    told = {"said": _kept(said), "default": _kept(default)}
    return {"origin": origin, "horizon": horizon, "at_once": at_once, "final": task.val()} | told


def _kept(said: dict[str, Any]) -> dict[str, Any]:
    return {key: said.get(key) for key in SAID}
