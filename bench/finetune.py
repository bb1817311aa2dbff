"""What is measured on one fine-tuning run of a pretrained model: as it is, one leap under its schedule, leaps all along."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import command
import pretrained_tasks as tasks
import torch
from cells import random_step, randomised
from trials import HORIZON, LEAPS, ONE, ORIGIN, PLAIN, RANDOM, STRETCHES, Trial

SAID = ("method", "horizon", "verdict", "ratio", "expected_ratio", "coherence", "recent_coherence", "p", "reason")
LEAP_SAID = ("gain", "horizon", "cosine", "reason")
STATE = "optimizer-at-origin.pt"


# --- the plain run, and one leap of it -------------------------------------------------------------------------------


def plain(trial: Trial) -> dict[str, Any]:
    """Train to the end; leaves the checkpoints up to the origin where the one leap is still to be measured."""
    keep = None if Trial(trial.setting, ONE).is_done else _history(trial)
    return {"curve": _train(trial, keep, until=trial.setting.steps)}


def _history(trial: Trial) -> Path:
    """The folder with the checkpoints of a plain run up to the origin."""
    return tasks.OUT / "runs" / trial.setting.label


def _train(trial: Trial, keep: Path | None, *, until: int) -> list[tuple[int, float, float]]:
    """Points (step, loss, accuracy) of the plain run; saves up to the origin, the whole folder or none."""
    run, steps = tasks.Run(trial.setting), trial.setting.steps
    curve = [(0, *run.judge())]
    partial = keep.with_name(f"{keep.name}.{os.getpid()}") if keep and not keep.exists() else None
    for step in range(1, until + 1):
        run.step(step - 1)
        if step % (steps // STRETCHES) == 0:
            curve.append((step, *run.judge()))
            if partial and step <= _origin(trial):
                run.save(partial / "run", step)
        if partial and keep and step == _origin(trial):
            torch.save(run.optimizer.state_dict(), partial / STATE)
            partial.replace(keep)
    return curve


def _origin(trial: Trial) -> int:
    return round(ORIGIN * trial.setting.steps)


def one_leap(trial: Trial) -> dict[str, Any]:
    """Forecast, control and a random direction from one origin, each trained to the end of the schedule.

    The counters are moved on: the steps of the horizon are skipped. The control has the origin's weights.
    """
    history = _history(trial)
    if not history.exists():
        _train(trial, history, until=_origin(trial))
    origin, horizon = _origin(trial), round(HORIZON * trial.setting.steps)
    last = tasks.read_weights(history / "run" / f"checkpoint-{origin}")
    state = torch.load(history / STATE, weights_only=True)
    told, forecast = _forecast(history / "run", horizon)
    starts = {"forecast": forecast, "control": last, "random": randomised(forecast, last, seed=origin + horizon)}
    found = {name: _resumed(trial, weights, state, origin + horizon) for name, weights in starts.items()}
    shutil.rmtree(history)
    return told | {"origin": origin, "horizon": horizon} | found


def _forecast(run: Path, horizon: int) -> tuple[dict[str, Any], tasks.Weights]:
    """What `farcast predict` writes by its default method, whatever its verdict; `default` is its own choice."""
    with tempfile.TemporaryDirectory(dir=tasks.OUT) as folder:
        fitted, ledger = Path(folder) / "forecaster.safetensors", ("--ledger", Path(folder) / "ledger.jsonl")
        code, said = command.outside("fit", run, "-o", fitted, *ledger, "-q", "--threads", 1)
        if code != command.DONE:
            raise command.CommandError(said)
        asked = ("--forecaster", fitted, *ledger, "--counters", "advance")
        default = command.predict(*asked, "--dry-run", call=command.outside)
        written = ("--horizon", horizon, "--even-if-worse", "-o", f"{folder}/forecasts/")
        forced = command.predict(*asked, *written, call=command.outside)
        kept = {name: {key: said.get(key) for key in SAID} for name, said in (("said", forced), ("default", default))}
        return kept, tasks.read_weights(Path(forced["path"]))


def _resumed(trial: Trial, weights: tasks.Weights, state: dict[str, Any], start: int) -> dict[str, Any]:
    run = tasks.Run(trial.setting)
    run.go_on_from(weights, state, start)
    at_once = run.judge()
    for step in range(start, trial.setting.steps):
        run.step(step)
    return {"at_once": at_once, "final": run.judge()}


# --- leaps after every stretch ---------------------------------------------------------------------------------------


def leaps(trial: Trial) -> dict[str, Any]:
    """A leap after every stretch but the last, counters kept; or, in mode `random`, in random directions.

    An evaluation comes before the leap at the same step; `after` is the loss right after it.
    """
    norms = _norms(trial) if trial.mode == RANDOM else None
    run, every, made = tasks.Run(trial.setting), trial.setting.steps // STRETCHES, []
    curve = [(0, *run.judge())]
    with tempfile.TemporaryDirectory(dir=tasks.OUT) as folder:
        for step in range(1, trial.setting.steps + 1):
            run.step(step - 1)
            if step % every == 0:
                curve.append((step, *run.judge()))
            if step % every == 0 and step < trial.setting.steps:
                made.append({"step": step} | _leap(run, Path(folder), step=step, norms=norms))
    return {"curve": curve, "leaps": made}


def _norms(trial: Trial) -> dict[int, dict[str, float] | None]:
    record = Trial(trial.setting, LEAPS).read()
    if record is None:
        raise ValueError(f"{trial.label}: expected the result of mode {LEAPS}, found none")
    return {leap["step"]: leap["norms"] for leap in record["leaps"]}


def _leap(run: tasks.Run, folder: Path, *, step: int, norms: dict[int, dict[str, float] | None] | None) -> dict[str, Any]:
    """`norms` in the answer is None where there was no leap."""
    last = run.get()
    if norms is None:
        run.save(folder / "run", step)
        forecasts = folder / "forecasts"
        where = ("--ledger", forecasts / "ledger.jsonl", "-o", f"{forecasts}/")
        said = command.leap(folder / "run", *where, call=command.outside)
        kept = {key: said.get(key) for key in LEAP_SAID}
        weights = tasks.read_weights(Path(said["path"])) if said.get("path") else None
    else:
        found, kept = norms[step], {}
        weights = random_step(last, found, seed=step) if found else None
    if weights is None:
        return kept | {"norms": None}
    run.set(weights)
    moved = {name: float((weights[name] - last[name]).norm()) for name in last}
    return kept | {"norms": moved, "after": run.judge()[0]}


MEASURES = {PLAIN: plain, ONE: one_leap, LEAPS: leaps, RANDOM: leaps}
