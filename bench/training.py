"""A training run as it goes along: its curve, its snapshots on disk, and the state to go on from.

Folders below bench/out/quality: `runs/` snapshots, `states/` model and optimiser at the origins, `fits/` forecasters,
`starts/` pre-trained weights. A folder is whole once the cell that it is named after has its JSON file.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import tasks
import torch
from safetensors.torch import load_file, save_file
from store import OUT, Cell
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.forecast.fitting import fit as fit_run
from farcast_cli.forecast.forecaster_file import load_fitted, save_fitted
from farcast_cli.run.trajectory import discover

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from farcast_cli.forecast.forecaster_file import Fitted

EVALUATIONS = 100  # per run
SNAPSHOTS = 50  # per run, saved
AVERAGED = 10  # evaluations apart from each other by 1 % of the run, in the average that is evaluated
ORIGINS = (0.2, 0.4, 0.7)
Weights = dict[str, torch.Tensor]


def run_folder(spec: tasks.Spec) -> Path:
    return OUT / "runs" / Cell("plain", spec).name


def state_file(spec: tasks.Spec, step: int) -> Path:
    return OUT / "states" / Cell("plain", spec).name / f"{step:06d}.pt"


def fit_file(spec: tasks.Spec) -> Path:
    return OUT / "fits" / f"{Cell('fit', spec).name}.safetensors"


def start_file(spec: tasks.Spec) -> Path:
    return OUT / "starts" / f"{Cell('pretrain', spec).name}.safetensors"


def snapshot_name(step: int, suffix: str = ".safetensors") -> str:
    return f"step_{step:06d}{suffix}"


def snapshot_file(spec: tasks.Spec, step: int) -> Path:
    """A snapshot of the plain run: the whole state where the run has a warm-up or a schedule (`Saver`)."""
    state = run_folder(spec) / snapshot_name(step, ".pt")
    return state if state.exists() else run_folder(spec) / snapshot_name(step)


def read_weights(path: Path) -> Weights:
    """The weights of a checkpoint."""
    return torch.load(path, weights_only=True)["model"] if path.suffix == ".pt" else load_file(path)


def open_task(spec: tasks.Spec) -> tasks.Task:
    return tasks.make(spec, load_file(start_file(spec.start)) if spec.start else None)


def mean(weights: Iterable[Weights]) -> Weights:
    several = list(weights)
    return {name: torch.stack([w[name] for w in several]).mean(0) for name in several[0]}


def loss_of(task: tasks.Task, weights: Weights) -> float:
    """The validation loss of other weights than the task's own."""
    own = task.get()
    task.set(weights)
    loss = task.val()
    task.set(own)
    return loss


class Saver:
    """Saves a run's snapshots as its loop would: the weights, or under a schedule the whole state, which tells the rate."""

    def __init__(self, task: tasks.Task, folder: Path) -> None:
        self.task, self.folder = task, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.is_constant = task.spec.schedule == "constant"
        self.schedule = None if self.is_constant else torch_schedule(task.spec, task.optimizer)
        self.step = 0

    def save(self, step: int) -> None:
        if self.schedule is None and self.task.spec.warmup:  # the optimiser tells the rate
            state = {"model": self.task.get(), "optimizer": self.task.optimizer.state_dict(), "step": step}
            torch.save(state, self.folder / snapshot_name(step, ".pt"))
            return
        if self.schedule is None:
            save_file(self.task.get(), self.folder / snapshot_name(step), metadata={"format": "pt"})
            return
        if step:
            _set_rate(self.task.optimizer, self.task.spec.rate(self.step))  # torch's schedules go on from the last rate
        while self.step < step:
            self.schedule.step()
            self.step += 1
        state = {"model": self.task.get(), "optimizer": self.task.optimizer.state_dict()}
        torch.save(state | {"scheduler": self.schedule.state_dict(), "step": step}, self.folder / snapshot_name(step, ".pt"))


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def torch_schedule(spec: tasks.Spec, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Torch's own schedules with the rates that `Spec.rate` has; farcast reads them from the snapshots."""
    _set_rate(optimizer, spec.lr * spec.rate_factor)  # what torch's schedules take for the full rate
    length, tail = spec.steps - spec.warmup, round(tasks.DECAYING * spec.steps)
    parts: list[tuple[int, LRScheduler]] = []  # each with the step at which it begins
    if spec.warmup:
        parts.append((0, LinearLR(optimizer, start_factor=1 / spec.warmup, total_iters=spec.warmup - 1)))
    if spec.schedule == "cosine":
        parts.append((spec.warmup, CosineAnnealingLR(optimizer, T_max=length)))
    elif spec.schedule == "linear":
        parts.append((spec.warmup, LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=length)))
    else:
        parts.append((spec.warmup, ConstantLR(optimizer, factor=1, total_iters=1)))
        if spec.schedule == "wsd":
            parts.append((spec.steps - tail, LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=tail)))
    if len(parts) == 1:
        return parts[0][1]
    return SequentialLR(optimizer, [part for _, part in parts], milestones=[start for start, _ in parts[1:]])


class Curve:
    """Validation losses along a run: of the weights, and of the mean of the last ten that were evaluated."""

    def __init__(self, task: tasks.Task) -> None:
        self.task = task
        self.recent: deque[Weights] = deque(maxlen=AVERAGED)
        self.points: list[tuple[int, float, float]] = []

    def add(self, step: int) -> None:
        self.recent.append(self.task.get())
        raw = self.task.val()
        self.points.append((step, raw, loss_of(self.task, mean(self.recent)) if len(self.recent) > 1 else raw))

    def leap(self) -> None:
        """What was before a leap does not go into an average after it."""
        self.recent.clear()


# --- cells -----------------------------------------------------------------------------------------------------------


def pretrain(cell: Cell) -> dict[str, Any]:
    """Train the model that fine-tuning starts from."""
    task = open_task(cell.spec)
    for step in range(cell.spec.steps):
        task.step(step)
    target = start_file(cell.spec)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(task.get(), target, metadata={"format": "pt"})
    return {"loss": task.val(), "num_weights": _num_weights(task)}


def plain(cell: Cell) -> dict[str, Any]:
    """Train a run to its end; leaves its snapshots, and the whole state at the origins."""
    spec, task = cell.spec, open_task(cell.spec)
    folder, curve = run_folder(spec), Curve(task)
    state_file(spec, 0).parent.mkdir(parents=True, exist_ok=True)
    origins = {round(share * spec.steps) for share in ORIGINS}
    saver = Saver(task, folder)
    for step in range(spec.steps + 1):
        if step % (spec.steps // EVALUATIONS) == 0:
            curve.add(step)
        if step % (spec.steps // SNAPSHOTS) == 0:
            saver.save(step)
        if step in origins and spec.schedule == "constant":
            torch.save({"model": task.get(), "optimizer": task.optimizer.state_dict()}, state_file(spec, step))
        if step < spec.steps:
            task.step(step)
    if not math.isfinite(curve.points[-1][1]):
        raise ValueError(f"{spec.name}: the run diverged")
    return {"curve": curve.points, "num_weights": _num_weights(task)}


def fit(cell: Cell) -> dict[str, Any]:
    """Fit farcast to the plain run's folder."""
    target = fit_file(cell.spec)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_fitted(fit_run(discover(run_folder(cell.spec)), num_samples=DEFAULT_SAMPLE), target)
    return {}


def fitted(spec: tasks.Spec) -> Fitted:
    return load_fitted(fit_file(spec))


def _num_weights(task: tasks.Task) -> int:
    return sum(p.numel() for p in task.parameters().values())
