"""The forecasting methods: each finds a step's coefficients over the Gram basis in its own way.

A function of a `Task` that returns w_hat - w_s as coefficients (K, R), and a line for people in METHODS. docs/method.md
has the formulas, their sources, and what was measured.

Shapes: K tensors, R = T + 1 basis vectors (see gram.py), I inputs of a regression, P places of a history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.errors import UsageError
from farcast_cli.forecast.forecaster import Method, set_step_norm
from farcast_cli.forecast.lfd2 import fit_lfd2
from farcast_cli.forecast.timeline import evenly

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.forecast.forecaster import Task
    from farcast_cli.forecast.timeline import Timeline

MAX_CONTEXT = 9  # snapshots that a slope is taken over: eight equal parts, whose quarters are the points of k5
RIDGE = 1e-2  # of the mean eigenvalue; a regression's shrinkage, flat between 1e-3 and 1e-1
NUM_FLOWS = 4  # k5 reads five points of the history, hence four moves between them
SCALES = (1 / 8, 1 / 4, 1 / 2)  # of the history: the windows of `window-means`, the longest is its recent half
WINDOW_CONTEXT = 16  # snapshots that they are taken from; within .01 of the ratio with all of them
AVERAGED = 5  # snapshots in each of the averages that `average-extrapolate` goes through (LAWA)
MAX_AVERAGED = 20  # snapshots in an average: each is a file to read
NOISE_WEIGHT = 4.0  # of the noise against the lag in an average: the loss is steeper along noise than along the drift
TREND_WINDOW = 0.5  # of the history; .3 leaves more noise, and more bends
MAX_TREND = 24  # snapshots that a trend goes through; its noise falls with their number
LINE_FIT = 5  # snapshots that `line-fit` goes through; of 3, 5, 10 and 20 the best on most of the small runs
ACCELERATED = 10  # moves that `accelerate` combines, and
ACCELERATE_RIDGE = 1e-8  # its ridge, of the largest eigenvalue: both as in its source's own runs


def every_tensor(step: NDArray[np.float64], task: Task) -> NDArray[np.float64]:
    """One step (R,) for all K tensors."""
    return np.tile(step, (len(task.gram.matrix), 1))


def persistence(task: Task) -> NDArray[np.float64]:
    """Nothing changes: Delta = 0. What every other method is measured against."""
    return every_tensor(np.zeros(task.gram.num_snapshots + 1), task)


# --- lines -----------------------------------------------------------------------------------------------------------


def line(task: Task) -> NDArray[np.float64]:
    """A straight line from half the history.

        Delta = h / (s - x) (w(s) - w(x)),   x = (t_0 + s) / 2

    Source: linear curve fit, the baseline of Weight Nowcaster Networks (Jang et al., ICML 2023).
    """
    timeline = task.timeline
    half = timeline.first + timeline.length / 2
    move = timeline.at(timeline.origin) - timeline.at(half)
    return every_tensor(move * task.reach / (timeline.origin - half), task)


def line_fit(task: Task) -> NDArray[np.float64]:
    """The least-squares slope over the last k = 5 snapshots, continued from the origin.

        Delta = h sum_j (t_j - tbar) w_j / sum_j (t_j - tbar)^2

    Only the slope is taken from the fitted line: it starts at w_s, not at the line's own value there.

    Source: linear curve fit, as for `line`, by least squares.
    """
    return every_tensor(task.reach * task.timeline.slope_over(task.timeline.places[-LINE_FIT:]), task)


def drift(task: Task) -> NDArray[np.float64]:
    """The recent least-squares slope: Delta = h (v[s - l, s] + v[s - l/2, s]) / 2, l = min(L, 2 h)."""
    timeline, origin = task.timeline, task.timeline.origin
    window = task.drift_window
    slope = timeline.slope(origin - window, origin) + timeline.slope(origin - window / 2, origin)
    return every_tensor(task.reach * slope / 2, task)


def rank_1(task: Task) -> NDArray[np.float64]:
    """A line in the coefficient of the history's first singular vector, per tensor.

        M     = rows w_t - w_0 over the snapshots t of the history
        M M^T = U Lambda U^T,   u = the eigenvector of the largest eigenvalue
        D     = sum_t u_t (w_t - w_0),   so that w_t - w_0 ~ u_t D
        Delta = (uhat(s + h) - u_s) D,   uhat = least-squares line, with a constant, through all (t, u_t)

    w_0 counts as a snapshot whose delta is zero. The source's forecast, w_0 + uhat(s + h) D, drops whatever part of w_s
    is not along D; ours is added to w_s and keeps it. The coefficient itself is the source's: what w_s has along D
    is replaced by the line's value.

    Source: RELEX, "You Only Need Minimal RLVR Training: Extrapolating LLMs via Rank-1 Trajectories" (Wei et al., arXiv
    2605.21468).
    """
    timeline = task.timeline
    times = np.array(timeline.places)
    deltas = np.stack([timeline.at(place) for place in timeline.places])  # (P, R)
    coefficients = np.linalg.eigh(deltas @ task.gram.matrix @ deltas.T)[1][..., -1]  # u, (K, P)
    centred = times - times.mean()
    ahead = (timeline.origin + task.reach - times.mean()) * centred / (centred @ centred) + 1 / len(times)
    change = coefficients @ ahead - coefficients[:, -1]
    return np.asarray(change[:, None] * coefficients @ deltas)


# --- regressions -----------------------------------------------------------------------------------------------------


def k5(task: Task) -> NDArray[np.float64]:
    """A ridge regression on the moves between five equally spaced points of the history, per tensor.

    F_i(T) = w(t_0 + (T - t_0) i / 4) - w(t_0 + (T - t_0) (i - 1) / 4),   i = 1..4
    c      = argmin || w(s) - w(x) - sum_i c_i F_i(x) ||^2 + lambda tr(G) / 4 ||c||^2,   lambda = 0.01
    Delta  = sum_i c_i F_i(s)
    """
    timeline = task.timeline
    return _regress(task, _flows(timeline, task.training_origin), _flows(timeline, timeline.origin))


def _flows(timeline: Timeline, end: float) -> NDArray[np.float64]:
    """The moves between equally spaced points of [t_0, end], as vectors (4, R)."""
    points = timeline.first + (end - timeline.first) * np.arange(NUM_FLOWS + 1) / NUM_FLOWS
    return np.diff(np.stack([timeline.at(float(point)) for point in points]), axis=0)


def window_means(task: Task) -> NDArray[np.float64]:
    """A ridge regression on how far the weights are from their recent means, at three scales, per tensor.

        F_i(T) = w(T) - mean of w over [T - a_i (T - t_0), T],   a = 1/8, 1/4, 1/2
        c      = argmin || w(s) - w(x) - sum_i c_i F_i(x) ||^2 + lambda tr(G) / 3 ||c||^2,   lambda = 0.01
        Delta  = sum_i c_i F_i(s)

    The means are taken along the path between snapshots. Ours.
    """
    timeline = task.timeline
    return _regress(task, _above_means(timeline, task.training_origin), _above_means(timeline, timeline.origin))


def _above_means(timeline: Timeline, end: float) -> NDArray[np.float64]:
    """What w(end) has over its means over windows that end there, as vectors (3, R)."""
    length = end - timeline.first
    return np.stack([timeline.at(end) - timeline.mean(end - length * scale, end) for scale in SCALES])


def _regress(task: Task, inputs: NDArray[np.float64], at_origin: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit the matched move on inputs (I, R) at x by ridge regression and apply the fit to those at the origin: (K, R)."""
    matrix, num_inputs = task.gram.matrix, len(inputs)
    normal = inputs @ matrix @ inputs.T  # (K, I, I)
    right = inputs @ (matrix @ task.matched_move)[..., None]  # (K, I, 1)
    if task.options.scope == "global":
        normal, right = (np.broadcast_to(a.sum(axis=0), a.shape) for a in (normal, right))
    trace = np.trace(normal, axis1=1, axis2=2)
    ridge = RIDGE * trace / num_inputs
    still = trace <= 0  # a tensor that never moved: any ridge gives the step 0
    normal = normal + np.where(still, 1.0, ridge)[:, None, None] * np.eye(num_inputs)
    return np.asarray(np.linalg.solve(normal, right)[..., 0] @ at_origin)


def blend(task: Task) -> NDArray[np.float64]:
    """The mean of two methods: Delta = (drift + k5 with step norm match) / 2."""
    return (drift(task) + set_step_norm(k5(task), task, "match")) / 2


def lfd2(task: Task) -> NDArray[np.float64]:
    """The paper's: one linear layer from the first and the last snapshot, trained on the L1 loss (see lfd2.py)."""
    return fit_lfd2(
        task.sample,
        task.timeline,
        task.training_origin,
        grad_weight=task.options.grad_weight,
        per_tensor=task.options.scope == "tensor",
    )


# --- averages --------------------------------------------------------------------------------------------------------


def average(task: Task) -> NDArray[np.float64]:
    """The mean of the last k snapshots. To evaluate or ship, never to resume from.

        Delta = mean of the last k snapshots - w_s
        k     = argmin 4 sigma^2 / k + ||v||^2 ((k - 1) / 2)^2,   2 <= k <= 20

    with the drift v per snapshot and the noise sigma^2 around it from a line through the recent half of the history, all
    tensors together: a longer average has less noise and lags further behind. The noise counts four times, because it
    lies in directions in which the loss is steep and the drift in flat ones (measured, docs/results.md).

    Source: latest weight averaging, LAWA (Kaddour, arXiv 2209.14981). The choice of k is ours.
    """
    timeline = task.timeline
    mean = timeline.mean_over(timeline.places[-averaging_window(task) :])
    return every_tensor(mean - timeline.at(timeline.origin), task)


def averaging_window(task: Task) -> int:
    """How many of the last snapshots `average` takes; see there."""
    places = _recent(task.timeline)
    total = task.gram.matrix.sum(axis=0)
    points = np.stack([task.timeline.at(place) for place in places])  # (P, R)
    times = np.arange(len(places)) - (len(places) - 1) / 2
    slope = times @ points / (times @ times)
    residuals = points - points.mean(axis=0) - np.outer(times, slope)
    noise = np.einsum("pr,rq,pq->", residuals, total, residuals) / max(1, len(places) - 2)
    counts = np.arange(2, min(MAX_AVERAGED, len(task.timeline.places)) + 1)
    error = NOISE_WEIGHT * noise / counts + (slope @ total @ slope) * ((counts - 1) / 2) ** 2
    return int(counts[np.argmin(error)])


def trend(task: Task) -> NDArray[np.float64]:
    """The least-squares line through the recent half of the history, at s + h.

        Delta   = line(s + h) - w_s
        line(t) = wbar + (t - tbar) v,   v = sum_j (t_j - tbar) w_j / sum_j (t_j - tbar)^2
        t_j     = the snapshots of [s - L / 2, s], at most 24 of them, evenly chosen

    Where an average lags behind by half its window, the line ends where the run is, without its noise. To evaluate or
    ship, never to resume from. Ours; a least-squares line is old.
    """
    timeline = task.timeline
    recent = _recent(timeline)
    places = [recent[index] for index in evenly(len(recent), MAX_TREND)]
    reach = timeline.origin + task.reach - np.mean(places)
    line = timeline.mean_over(places) + reach * timeline.slope_over(places)
    return every_tensor(line - timeline.at(timeline.origin), task)


def _recent(timeline: Timeline) -> list[float]:
    """The snapshots that a trend goes through, three at least."""
    inside = [place for place in timeline.places if place >= timeline.origin - TREND_WINDOW * timeline.length]
    return inside if len(inside) >= 3 else timeline.places[-3:]  # noqa: PLR2004 - two have no noise around their line


def average_extrapolate(task: Task) -> NDArray[np.float64]:
    """A line through two consecutive averages.

        A_2   = mean of the last k snapshots, at their mean step t_2
        A_1   = mean of the k before, at their mean step t_1,   k = 5, or half of what the history holds if that is fewer
        w_hat = A_2 + (A_2 - A_1) / (t_2 - t_1) (s + h - t_2)
        Delta = w_hat - w_s

    The line starts at the average, so Delta also takes the weights back from their noise to the middle of it.

    Source: "Extra-Merge: Tracing the Rank-1 Subspace of Model Merging in Language Model Pre-Training" (arXiv
    2605.26484). How far to go along the line is our choice: as far as the horizon.
    """
    timeline = task.timeline
    count = min(AVERAGED, len(timeline.places) // 2)
    windows = timeline.places[-2 * count : -count], timeline.places[-count:]
    before, last = map(timeline.mean_over, windows)
    first_step, last_step = map(np.mean, windows)
    reach = (timeline.origin + task.reach - last_step) / (last_step - first_step)
    return every_tensor(last + reach * (last - before) - timeline.at(timeline.origin), task)


def accelerate(task: Task) -> NDArray[np.float64]:
    """Regularised non-linear acceleration: the weighted average of recent points at which the moves cancel best.

        p_0 .. p_k = k + 1 equally spaced points from the last k + 1 snapshots to the origin,   k = 10 or fewer
        R          = columns r_i = w(p_i) - w(p_{i-1}),   i = 1..k
        c          = argmin c^T (R^T R / ||R^T R||_2 + lambda I) c   where sum_i c_i = 1,   lambda = 1e-8
                   = z / sum_i z_i,   (R^T R / ||R^T R||_2 + lambda I) z = 1
        Delta      = sum_i c_i w(p_i) - w_s

    It looks for the point at which training would stand still, and does not depend on the horizon. One c for all
    tensors, as in the source, whose point is one of the whole network; `--scope tensor` fits each by itself.

    Source: RNA, "Regularized Nonlinear Acceleration" (Scieur, d'Aspremont, Bach, arXiv 1606.04133) and "Online
    Regularized Nonlinear Acceleration" (Scieur, Oyallon, d'Aspremont, Bach, arXiv 1805.09639). Each move's share goes to
    the point at its end, as in the authors' code; the first paper's formula gives it to the point at its start.
    """
    timeline = task.timeline
    recent = timeline.places[-ACCELERATED - 1 :]
    points = np.linspace(recent[0], recent[-1], len(recent))
    weights = np.stack([timeline.at(float(point)) for point in points])  # (k + 1, R)
    moves = np.diff(weights, axis=0)
    products = moves @ task.gram.matrix @ moves.T  # R^T R, (K, k, k)
    if task.options.scope != "tensor":
        products = np.broadcast_to(products.sum(axis=0), products.shape)
    size = np.linalg.norm(products, 2, axis=(1, 2))[:, None, None]
    scaled = np.divide(products, size, out=np.zeros_like(products), where=size > 0)  # a tensor that never moved: any c
    solved = np.linalg.solve(scaled + ACCELERATE_RIDGE * np.eye(len(moves)), np.ones((len(moves), 1)))[..., 0]
    shares = solved / solved.sum(axis=1, keepdims=True)
    return np.asarray(shares @ weights[1:] - timeline.at(timeline.origin))


METHODS = {
    method.name: method
    for method in (
        Method("blend", blend, "free", "mean of drift and k5: the default to resume from", MAX_CONTEXT),
        Method("k5", k5, "clip", "ridge regression on five points of the history: the default for later weights as such"),
        Method(
            "trend",
            trend,
            "free",
            "the end of a line through the recent half: the default to evaluate, never to resume",
            averages=True,
            extrapolates=True,
        ),
        Method(
            "window-means",
            window_means,
            "clip",
            "ridge regression on the distance from recent means, three scales",
            WINDOW_CONTEXT,
        ),
        Method("drift", drift, "free", "the recent least-squares slope, continued", MAX_CONTEXT),
        Method("lfd2", lfd2, "free", "the paper's one-layer network on the first and last snapshot, L1 loss"),
        Method("line", line, "free", "a straight line from the middle of the history"),
        Method("line-fit", line_fit, "free", "the least-squares slope of the last five snapshots, continued"),
        Method("rank-1", rank_1, "free", "a line in the coefficient of the first singular vector (RELEX)", MAX_CONTEXT),
        Method("average-extrapolate", average_extrapolate, "free", "a line through two consecutive averages (Extra-Merge)"),
        Method(
            "average",
            average,
            "free",
            "mean of the last snapshots, as many as the evidence favours: to evaluate, never to resume",
            averages=True,
        ),
        Method(
            "accelerate",
            accelerate,
            "free",
            "weighted average at which the moves cancel (RNA), whatever the horizon: to evaluate, never to resume",
            averages=True,
        ),
        Method("persistence", persistence, "free", "nothing changes: the control"),
    )
}


def find_method(name: str) -> Method:
    if name not in METHODS:
        raise UsageError(f"--method {name}: expected one of {', '.join(METHODS)}")
    return METHODS[name]
