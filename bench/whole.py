"""Whole runs with a leap after every tenth: what repeated use is worth in steps that need not be trained.

The run's folder, its ledger and its forecasts are what a user's would be, and so are the commands. What counts is the
number of steps that were trained; the step counter, which names snapshots and picks batches, is moved on by each leap.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import training
from cells import random_step
from safetensors.torch import load_file, save_file
from store import Cell

if TYPE_CHECKING:
    import tasks

SEGMENTS = 10
SNAPSHOTS = 10  # per segment
GATED, UNGATED, RANDOM, DOUBLED = "gated", "ungated", "random", "doubled"
MODES = (GATED, UNGATED, RANDOM, DOUBLED)


@dataclass(frozen=True)
class Place:
    """Where a run keeps its files."""

    top: Path

    @property
    def run(self) -> Path:
        return self.top / "run"

    @property
    def forecaster(self) -> Path:
        return self.top / "forecaster.safetensors"

    @property
    def ledger(self) -> Path:
        return self.top / "ledger.jsonl"

    def save(self, task: tasks.Task, counter: int) -> None:
        self.run.mkdir(exist_ok=True)
        save_file(task.get(), self.run / training.snapshot_name(counter), metadata={"format": "pt"})


def whole(cell: Cell) -> dict[str, Any]:
    """Train as many steps as the plain run did, in ten segments, with or without a leap between two."""
    spec = replace(cell.spec, rate_factor=2 * cell.spec.rate_factor) if cell.method == DOUBLED else cell.spec
    task = training.open_task(spec)
    curve, leaps, counter = training.Curve(task), [], 0
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.save(task, counter)
        curve.add(0)
        for segment in range(1, SEGMENTS + 1):
            counter = _segment(task, curve, place, counter=counter)
            if segment < SEGMENTS and cell.method != DOUBLED:
                leaps.append({"segment": segment} | _leap(cell, task, place, segment=segment, counter=counter))
                if leaps[-1]["horizon"]:
                    counter += leaps[-1]["horizon"]
                    curve.leap()
    return {"curve": curve.points, "leaps": leaps}


def _segment(task: tasks.Task, curve: training.Curve, place: Place, *, counter: int) -> int:
    """A tenth of the steps; returns the counter after them."""
    every = task.spec.steps // SEGMENTS // SNAPSHOTS
    for done in range(1, task.spec.steps // SEGMENTS + 1):
        task.step(counter)
        counter += 1
        if done % every == 0:
            place.save(task, counter)
            curve.add(curve.points[-1][0] + every)
    return counter


def _leap(cell: Cell, task: tasks.Task, place: Place, *, segment: int, counter: int) -> dict[str, Any]:
    """Leap if the mode's decision is to; `horizon` is 0 where it is not."""
    last, before = task.get(), task.val()
    if cell.method == RANDOM:
        gated = Cell("whole", cell.spec, method=GATED).read()
        found = next(leap for leap in gated["result"]["leaps"] if leap["segment"] == segment) if gated else {"horizon": 0}
        leap = {key: found.get(key) for key in ("horizon", "norms")}
        weights = random_step(last, leap["norms"], seed=counter) if leap["horizon"] else None
    else:
        leap, weights = _ask(place, force=cell.method == UNGATED)
        leap["norms"] = {name: float((weights[name] - last[name]).norm()) for name in last} if weights else None
    if weights:
        task.set(weights)
    return leap | {"counter": counter, "before": before, "after": task.val() if weights else before}


def _ask(place: Place, *, force: bool) -> tuple[dict[str, Any], training.Weights | None]:
    """`farcast fit` and `farcast predict`, as a user calls them."""
    ledger = ("--ledger", place.ledger)
    reading = ("-q", "--device", "cpu", "--threads", 1)
    code, said = command.farcast("fit", place.run, "-o", place.forecaster, *ledger, *reading)
    if code == command.UNUSABLE:
        return {"horizon": 0, "verdict": "untestable", "reason": said.strip()}, None
    options = ("--method", "blend", "--even-if-worse") if force else ()
    output = ("-o", f"{place.top / 'forecasts'}/")
    forecast = command.predict("--forecaster", place.forecaster, *ledger, *output, *options)
    keys = ("method", "verdict", "ratio", "coherence", "reason", "valid_step")
    kept = {key: forecast.get(key) for key in keys}
    if not forecast.get("path"):
        return kept | {"horizon": 0}, None
    return kept | {"horizon": forecast["horizon"]}, load_file(forecast["path"])
