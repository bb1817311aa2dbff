"""Leaps all along a fine-tuning run, steered by the loss: `farcast leap --eval-cmd` after every stretch.

The command gives the loss on every other one of the held-out texts. The figures are of all of them: one number, the gain,
is all that those texts can have an influence on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import pretrained_tasks as tasks
from finetune import LEAP_SAID
from judge import judging
from trials import STRETCHES

if TYPE_CHECKING:
    from trials import Trial


def judged(trial: Trial) -> dict[str, Any]:
    """A leap after every stretch but the last, counters kept, its gain steered by the loss."""
    run, every, made = tasks.Run(trial.setting), trial.setting.steps // STRETCHES, []
    curve = [(0, *run.judge())]

    def guide(checkpoint: Path) -> float:
        own, all_rows = run.get(), run.judged
        run.set(tasks.read_weights(checkpoint))
        run.judged = all_rows[::2]
        loss = run.judge()[0] * len(all_rows) / len(run.judged)  # judge() divides by all texts
        run.judged = all_rows
        run.set(own)
        return loss

    with tempfile.TemporaryDirectory(dir=tasks.OUT) as folder, judging(guide, Path(folder)) as evaluate:
        for step in range(1, trial.setting.steps + 1):
            run.step(step - 1)
            if step % every:
                continue
            curve.append((step, *run.judge()))
            if step < trial.setting.steps:
                made.append({"step": step} | _leap(run, Path(folder), step, evaluate))
    return {"curve": curve, "leaps": made}


def _leap(run: tasks.Run, folder: Path, step: int, evaluate: str) -> dict[str, Any]:
    run.save(folder / "run", step)
    forecasts = folder / "forecasts"
    where = ("--ledger", forecasts / "ledger.jsonl", "-o", f"{forecasts}/", "--eval-cmd", evaluate)
    said = command.leap(folder / "run", *where, call=command.outside)
    kept = {key: said.get(key) for key in (*LEAP_SAID, "share", "loss_signal")}
    if not said.get("path"):
        return kept | {"norms": None}
    run.set(tasks.read_weights(Path(said["path"])))
    return kept | {"norms": {}, "after": run.judge()[0]}
