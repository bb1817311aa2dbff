"""Leaps with memory: a leap after every short stretch of a run, and how many steps of training they save.

A run of N steps is cut into stretches. After each but the last `farcast leap` reads the run's folder, its ledger and
its own memory, and writes the checkpoint to go on from. Counters are NOT moved: rates and batches are those of the
steps that were really trained, and every mode trains as many steps as the plain run. Every N / 50 steps the loss is
taken of the weights (raw) and of the mean of the last ten that were evaluated (averaged: a window of 20 % of the run,
across leaps). An evaluation comes before the leap at the same step.

`judged` does as `leaps`, with `--eval-cmd`: the gain is steered by the loss on held-out data that no figure is taken of.
Controls: `none` does not leap; `random` leaps where `leaps` did, with the same norm per tensor and a random direction;
`rate-2` and `rate-4` do not leap and train at twice and four times the rate.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import training
from cells import random_step
from judge import judging

if TYPE_CHECKING:
    import tasks
    from store import Cell

EVALUATIONS = 50  # of a run
NONE, LEAPS, JUDGED, RANDOM = "none", "leaps", "judged", "random"
FACTORS = {"rate-2": 2.0, "rate-4": 4.0}  # modes without leaps, on the rate
SAID = ("gain", "horizon", "share", "loss_signal", "reason")


def methods(*counts: int) -> tuple[str, ...]:
    """Modes of the cells: those that leap carry the number of stretches, as in `leaps-50`."""
    return NONE, *FACTORS, *(f"{mode}-{count}" for count in counts for mode in (LEAPS, JUDGED, RANDOM))


def control_of(cell: Cell) -> Cell | None:
    """The cell whose leaps a random one copies the norms of."""
    return replace(cell, method=cell.method.replace(RANDOM, LEAPS)) if cell.method.startswith(RANDOM) else None


@dataclass(frozen=True)
class Place:
    """Where a run and its forecasts lie."""

    top: Path

    @property
    def run(self) -> Path:
        return self.top / "run"

    def ask(self, evaluate: str | None) -> tuple[dict[str, Any], training.Weights | None]:
        """`farcast leap`, as a loop calls it; the weights are None where there is nothing to gain."""
        forecasts = self.top / "forecasts"
        steered = ("--eval-cmd", evaluate) if evaluate else ()
        said = command.leap(self.run, "--ledger", forecasts / "ledger.jsonl", "-o", f"{forecasts}/", *steered)
        kept = {key: said.get(key) for key in SAID}
        return kept, training.read_weights(Path(said["path"])) if said.get("path") else None


def memory(cell: Cell) -> dict[str, Any]:
    """Train a run in one of the modes."""
    factor = FACTORS.get(cell.method, 1.0)
    spec = replace(cell.spec, rate_factor=factor * cell.spec.rate_factor)
    task = training.open_task(spec)
    curve, leaps, ends = training.Curve(task), [], _ends(cell)
    copied = control_of(cell)
    norms = {leap["step"]: leap["norms"] for leap in _record(copied)["leaps"]} if copied else None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place = Place(Path(folder))
        evaluate = stack.enter_context(judging(partial(_guide, task), place.top)) if cell.method.startswith(JUDGED) else None
        saver = training.Saver(task, place.run)
        saver.save(0)
        curve.add(0)
        for step in range(1, spec.steps + 1):
            task.step(step - 1)
            if step in _marks(spec, EVALUATIONS):
                curve.add(step)
            if step in ends:
                saver.save(step)
                leaps.append({"step": step} | _leap(task, place, evaluate, seed=step, norms=norms))
    return {"curve": curve.points, "leaps": leaps}


def _ends(cell: Cell) -> set[int]:
    """The steps after which a leap is tried."""
    count = cell.method.rpartition("-")[2] if cell.method.startswith((LEAPS, JUDGED, RANDOM)) else "1"
    return _marks(cell.spec, int(count)) - {cell.spec.steps}


def _marks(spec: tasks.Spec, count: int) -> set[int]:
    return {round(index * spec.steps / count) for index in range(1, count + 1)}


def _record(cell: Cell) -> dict[str, Any]:
    record = cell.read()
    if record is None:
        raise ValueError(f"{cell.label}: expected its result, found none")
    return dict(record["result"])


def _guide(task: tasks.Task, path: Path) -> float:
    """The loss to steer by of a checkpoint."""
    own = task.get()
    task.set(training.read_weights(path))
    loss = task.guide()
    task.set(own)
    return loss


def _leap(
    task: tasks.Task, place: Place, evaluate: str | None, *, seed: int, norms: dict[int, dict[str, float] | None] | None
) -> dict[str, Any]:
    """Leap by farcast, or by given norms; `norms` in the answer is None where there was no leap."""
    last = task.get()
    said: dict[str, Any] = {}
    if norms is None:
        said, weights = place.ask(evaluate)
    else:
        found = norms[seed]
        weights = random_step(last, found, seed=seed) if found else None
    if weights is None:
        return said | {"norms": None}
    before = task.val()
    task.set(weights)
    moved = {name: float((weights[name] - last[name]).norm()) for name in last}
    return said | {"norms": moved, "before": before, "after": task.val()}
