"""The forecasting methods: a step from the last snapshot as coefficients over the Gram basis.

Each method is a function of a `Task` (a history, an origin, a horizon) and returns the step w_hat - w_s as
coefficients (K, R): algebra on the statistic, never on tensors. docs/method.md has the formulas and their sources.

Shapes: K tensors, R = T + 1 basis vectors (see gram.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from farcast_cli.errors import UsageError
from farcast_cli.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from farcast_cli.gram import Gram, Sample

StepNorm = Literal["match", "match-plain", "clip", "free"]
Scope = Literal["auto", "tensor", "global"]

RIDGE = 1e-2  # of the mean eigenvalue; k5's shrinkage, flat between 1e-3 and 1e-1
MAX_MATCH = 3.0  # bf16 moves below one ulp once asked for a factor of 22: noise
NUM_FLOWS = 4  # k5 reads five points of the history, hence four moves between them
AVERAGED = 5  # snapshots in an average (LAWA)
MAX_CONTEXT = 10  # snapshots that a slope is taken over; twice as many change the ratio by .04 at most
DRIFT_WINDOW = 2.0  # horizons: a slope over a longer window overshoots where a run slows down


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose of a method. `step_norm` None leaves it to the method."""

    step_norm: StepNorm | None = None
    scale: float = 1.0
    scope: Scope = "auto"
    grad_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Task:
    """Forecast `horizon` steps ahead of the timeline's origin."""

    gram: Gram
    sample: Sample
    timeline: Timeline
    horizon: float
    options: Options = field(default_factory=Options)
    device: str = "cpu"

    @property
    def lead(self) -> float:
        """R = h / L, with the history's length for the time that has passed."""
        return self.horizon / self.timeline.length

    @property
    def training_origin(self) -> float:
        """X = t_0 + L / (1 + r): from there to the origin lies the same lead as from the origin to the forecast."""
        return self.timeline.first + self.timeline.length / (1 + self.lead)

    @property
    def matched_move(self) -> NDArray[np.float64]:
        """w(s) - w(x), (R,): the past move that the forecast is likened to."""
        return self.timeline.at(self.timeline.origin) - self.timeline.at(self.training_origin)

    def backtest(self) -> Task:
        """The same task inside the history: from x to s, where the truth is known.

        Where x lies behind the last snapshot before s, that snapshot takes its place: w(x) is interpolated between
        the two, and a test that started there would have seen part of the truth.
        """
        timeline = self.timeline
        start = min(self.training_origin, float(timeline.steps[max(0, timeline.num_snapshots - 2)]))
        return replace(self, timeline=timeline.before(start), horizon=timeline.origin - start)


@dataclass(frozen=True, slots=True)
class Method:
    """A forecasting method: its step, how the step's norm is set by default, and a line for people."""

    name: str
    step: Callable[[Task], NDArray[np.float64]]
    step_norm: StepNorm
    summary: str
    max_context: int | None = None


def forecast(method: Method, task: Task) -> NDArray[np.float64]:
    """The step (K, R) of a method with its norm set and scaled as the task's options ask."""
    norm = task.options.step_norm or method.step_norm
    return set_step_norm(plain_step(method, task), task, norm) * task.options.scale


def plain_step(method: Method, task: Task) -> NDArray[np.float64]:
    """The step (K, R) as the method gives it, from no more snapshots than it needs: each is one file to read."""
    visible = task.timeline.num_snapshots
    if method.max_context is None or visible <= method.max_context:
        return method.step(task)
    keep = np.linspace(0, visible - 1, method.max_context).round().astype(int).tolist()
    if visible < task.gram.num_snapshots:
        keep.append(visible)  # an origin between snapshots is interpolated towards the next one
    thinned = replace(
        task,
        gram=task.gram.restrict(keep),
        sample=task.sample.restrict(keep),
        timeline=Timeline(task.gram.steps[keep], task.timeline.origin),
    )
    return method.step(thinned) @ task.gram.change_of_basis(keep)


def set_step_norm(step: NDArray[np.float64], task: Task, norm: StepNorm) -> NDArray[np.float64]:
    """Scale each tensor's step by its past move m = ||w(s) - w(x)||.

        match        Delta min(m (1 + r) / ||Delta||, 3)   least squares shrinks a step; this undoes it
        match-plain  Delta min(m / ||Delta||, 3)
        clip         Delta min(m / ||Delta||, 1)
        free         Delta

    The matched window is h / (1 + r) long, hence the factor (1 + r): without it a straight path is under-shot.
    """
    if norm == "free":
        return step
    move = task.gram.norms(task.matched_move) * (1 + task.lead if norm == "match" else 1.0)
    size = task.gram.norms(step)
    factor = np.divide(move, size, out=np.zeros_like(move), where=size > 0)
    limit = 1.0 if norm == "clip" else MAX_MATCH
    return step * np.minimum(factor, limit)[:, None]


def every_tensor(step: NDArray[np.float64], task: Task) -> NDArray[np.float64]:
    """One step (R,) for all K tensors."""
    return np.tile(step, (len(task.gram.matrix), 1))


# --- methods ---------------------------------------------------------------------------------------------------------


def persistence(task: Task) -> NDArray[np.float64]:
    """Nothing changes: Delta = 0. What every other method is measured against."""
    return every_tensor(np.zeros(task.gram.num_snapshots + 1), task)


def line(task: Task) -> NDArray[np.float64]:
    """A straight line from half the history: Delta = h / (s - x) (w_s - w_x), x = (t_0 + s) / 2.

    Source: linear curve fit, the baseline of Weight Nowcaster Networks (Jang et al., ICML 2023).
    """
    timeline = task.timeline
    half = timeline.first + timeline.length / 2
    move = timeline.at(timeline.origin) - timeline.at(half)
    return every_tensor(move * task.horizon / (timeline.origin - half), task)


def average(task: Task) -> NDArray[np.float64]:
    """The mean of the last five snapshots: Delta = mean(w) - w_s. To evaluate or ship, never to resume from.

    Source: latest weight averaging, LAWA (Kaddour, arXiv 2209.14981).
    """
    timeline = task.timeline
    last = timeline.steps[timeline.steps <= timeline.origin][-AVERAGED:]
    mean = np.mean([timeline.at(float(step)) for step in last], axis=0)
    return every_tensor(mean - timeline.at(timeline.origin), task)


def drift(task: Task) -> NDArray[np.float64]:
    """The recent least-squares slope: Delta = h (v[s - l, s] + v[s - l/2, s]) / 2, l = min(L, 2 h)."""
    timeline, origin = task.timeline, task.timeline.origin
    window = min(timeline.length, DRIFT_WINDOW * task.horizon)
    slope = timeline.slope(origin - window, origin) + timeline.slope(origin - window / 2, origin)
    return every_tensor(task.horizon * slope / 2, task)


def k5(task: Task) -> NDArray[np.float64]:
    """A ridge regression on the moves between five equally spaced points of the history, per tensor.

    F_i(T) = w(t_0 + (T - t_0) i / 4) - w(t_0 + (T - t_0) (i - 1) / 4),  i = 1..4
    c = argmin || w(s) - w(x) - sum_i c_i F_i(x) ||^2 + lambda tr(G) / 4 ||c||^2
    Delta = sum_i c_i F_i(s)
    """
    inputs, target = _flows(task.timeline, task.training_origin), task.matched_move
    matrix = task.gram.matrix
    normal = inputs @ matrix @ inputs.T  # (K, 4, 4)
    right = inputs @ (matrix @ target)[..., None]  # (K, 4, 1)
    if task.options.scope == "global":
        normal, right = (np.broadcast_to(a.sum(axis=0), a.shape) for a in (normal, right))
    trace = np.trace(normal, axis1=1, axis2=2)
    ridge = RIDGE * trace / NUM_FLOWS
    still = trace <= 0  # a tensor that never moved: any ridge gives the step 0
    normal = normal + np.where(still, 1.0, ridge)[:, None, None] * np.eye(NUM_FLOWS)
    return np.asarray(np.linalg.solve(normal, right)[..., 0] @ _flows(task.timeline, task.timeline.origin))


def _flows(timeline: Timeline, end: float) -> NDArray[np.float64]:
    """The moves between equally spaced points of [t_0, end], as vectors (4, R)."""
    points = timeline.first + (end - timeline.first) * np.arange(NUM_FLOWS + 1) / NUM_FLOWS
    return np.diff(np.stack([timeline.at(float(point)) for point in points]), axis=0)


def blend(task: Task) -> NDArray[np.float64]:
    """The mean of `drift` and `k5` with step norm `match`: Delta = (d_1 + d_2) / 2."""
    return (drift(task) + set_step_norm(k5(task), task, "match")) / 2


def lfd2(task: Task) -> NDArray[np.float64]:
    """The paper's: one linear layer from the first and the last snapshot, trained on the L1 loss (see lfd2.py)."""
    from farcast_cli.lfd2 import fit_lfd2

    return fit_lfd2(
        task.sample,
        task.timeline,
        task.training_origin,
        grad_weight=task.options.grad_weight,
        per_tensor=task.options.scope == "tensor",
        device=task.device,
    )


METHODS = {
    method.name: method
    for method in (
        Method("blend", blend, "free", "mean of drift and k5: the default to resume from", MAX_CONTEXT),
        Method("k5", k5, "clip", "ridge regression on five points of the history: the default for evaluation"),
        Method("drift", drift, "free", "the recent least-squares slope, continued", MAX_CONTEXT),
        Method("lfd2", lfd2, "free", "the paper's one-layer network on the first and last snapshot, L1 loss"),
        Method("line", line, "free", "a straight line from the middle of the history"),
        Method("average", average, "free", "mean of the last five snapshots: to evaluate, never to resume"),
        Method("persistence", persistence, "free", "nothing changes: the control"),
    )
}


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise UsageError(f"--method {name}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
