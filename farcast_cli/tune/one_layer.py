"""One layer, exactly, at a cost per iteration that does not know the layer's size m^2.

Every gradient of a layer is a sum of n rank-one terms, sum_i g_i d_i^T, with d_i the inputs of the n rows (or what anchors
leave of them). So all that gradient descent, momentum, weight decay, ridge, conjugate gradients and Gauss-Newton ever
make of W_0 is

    W = c W_0 + U^T D,      Z = X W^T = c Z_0 + K U,      Z_0 = X W_0^T,  K = X D^T

and an iteration costs O(n^2 m): c, U and Z move, W_0 is not touched. In these coordinates <U, V> of W-space is
tr(U^T K V) for the rows that are tuned on, so that conjugate gradients take the very steps they would take there.

Source: the claim (pay m^2 once, then less per iteration) is the abstract's of Song, Zhang, Zhang, "Training
Multi-Layer Over-Parametrized Neural Network in Subquadratic Time" (arXiv 2112.07628); the algorithm is our derivation.

Shapes: n rows tuned on, m outputs of the layer, k outputs of the head; X, D (n, m_in), U, Z (n, m), K (n, n).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.choices import MOMENTUM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from farcast_cli.choices import SolverName
    from farcast_cli.tune.objective import Objective

    Array = NDArray[np.float64]


ITERATIONS = {"gauss-newton": 30, "gradient-descent": 300}
PATIENCE = {"gauss-newton": 5, "gradient-descent": 30}
"""Iterations without a better loss on the early-stopping rows, after which a method ends."""
RIDGES = tuple(10.0**exponent for exponent in range(1, -9, -1))
"""Of the closed form, as shares of the mean of K's diagonal; the early-stopping rows choose."""
DIRECT_ROWS, DIRECT_BYTES = 1024, 64 << 20  # n k, and bytes of the Jacobian, up to which its Gram matrix is solved directly
CG_ITERATIONS, CG_TOLERANCE = 40, 1e-3
"""Of an inner solve: a tighter one changes the path, and neither where it ends nor how soon."""
POWER_ITERATIONS = 12
TRIANGLE = 64  # rows of a triangular system that are solved at once
FIRST_DAMPING = 1.0
"""Of the largest curvature. From there the early-stopping rows choose on a finer path than from 0.001. Labels of unseen
characters: a loss of 2.94 against 3.05, and beside anchors 3.46 against none. Targets as noisy as they are large: of 25
tunings that should help 25 begin and 2 do harm, against 11 and 8. Some six iterations more are the price."""
LEAST_DAMPING = 1e-6  # of the largest curvature; below, a step amplifies rounding
LEAST_GAIN = 1e-13  # of the first loss; a step that gains less gains rounding
SHRINK, GROW, MAX_TRIES = 1 / 3, 4.0, 15
GOOD, POOR = 0.75, 0.25
"""Of the gain that the quadratic model promises: above the first the damping shrinks, below the second it grows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows by all that is needed of them: Z_0 (n, m), X D^T (n, r) and the targets, (n, k) or labels (n,)."""

    base: Array
    overlap: Array
    targets: NDArray[Any]

    def pre(self, point: Point) -> Array:
        """Their pre-activations at a point, (n, m)."""
        pre = self.overlap @ point.factors
        pre += self.base if point.scale == 1 else point.scale * self.base
        return pre


@dataclass(slots=True)
class Point:
    """Where W is: c and U (r, m)."""

    scale: float
    factors: Array

    def copy(self) -> Point:
        return Point(self.scale, self.factors.copy())


@dataclass(frozen=True, slots=True)
class Problem:
    """The rows tuned on, those that stop it early (none: it runs to its end), and what is made small."""

    objective: Objective
    tuned: Rows
    early: Rows | None = None

    @property
    def start(self) -> Point:
        return Point(1.0, np.zeros((self.tuned.overlap.shape[1], self.tuned.base.shape[1])))


@dataclass(frozen=True, slots=True)
class Settings:
    """How to tune. `ridge` pulls towards W_0, `weight_decay` towards 0; a rate of None is found from the curvature."""

    method: SolverName = "gauss-newton"
    iterations: int | None = None
    rate: float | None = None
    momentum: float = MOMENTUM
    weight_decay: float = 0.0
    ridge: float = 0.0
    inner_iterations: int = CG_ITERATIONS
    inner_tolerance: float = CG_TOLERANCE

    @property
    def num_iterations(self) -> int:
        return ITERATIONS[self.method] if self.iterations is None else self.iterations


@dataclass(slots=True)
class Tuned:
    """Where the tuning ended: the best point by the early-stopping rows, and the losses on the way to its last."""

    point: Point
    losses: list[float] = field(default_factory=list)
    early_losses: list[float] = field(default_factory=list)
    best: int = 0


def tune(problem: Problem, settings: Settings) -> Tuned:
    """Iterate until the early-stopping rows stop it, or to the end where there are none.

    `losses[t]` is the loss of the rows tuned on after t iterations, without ridge or decay.
    """
    if settings.method == "gradient-descent":
        path = descend(problem, settings)
    elif problem.objective.loss == "mse" and problem.objective.activation == "none" and problem.objective.head is None:
        return _follow(closed_form(problem, settings), problem, len(RIDGES) + 1, len(RIDGES) + 1)
    else:
        path = newton(problem, settings)
    return _follow(path, problem, settings.num_iterations, PATIENCE[settings.method])


def _follow(path: Iterator[tuple[Point, float]], problem: Problem, iterations: int, patience: int) -> Tuned:
    found = Tuned(problem.start)
    for iteration, (point, loss) in enumerate(path):
        found.losses.append(loss)
        score = loss
        if problem.early is not None:
            score = problem.objective.value(problem.early.pre(point), problem.early.targets)
            found.early_losses.append(score)
            if score < min(found.early_losses[:-1], default=np.inf):
                found.point, found.best = point.copy(), iteration
        else:
            found.point, found.best = point, iteration
        if iteration >= iterations or iteration - found.best >= patience or not np.isfinite(score):
            break
    return found


# --- gradient descent ------------------------------------------------------------------------------------------------


def descend(problem: Problem, settings: Settings) -> Iterator[tuple[Point, float]]:
    """Full-batch gradient descent as torch.optim.SGD has it: (point, loss) before each step.

        V <- mu V + grad,  W <- W - rate V,   grad = dL/dW + decay W + ridge (W - W_0)

    In coordinates V = v_c W_0 + V_U^T D, and W - W_0 = (c - 1) W_0 + U^T D.
    """
    rows, objective = problem.tuned, problem.objective
    point, velocity, scale_velocity = problem.start, np.zeros_like(problem.start.factors), 0.0
    pull = settings.weight_decay + settings.ridge
    rate = settings.rate
    while True:
        loss, gradient = objective.value_and_gradient(rows.pre(point), rows.targets)
        yield point, loss
        if rate is None:
            rate = 1 / (largest_curvature(problem, point) + pull)
        if pull:
            gradient += pull * point.factors
        velocity *= settings.momentum
        velocity += gradient
        scale_velocity *= settings.momentum
        scale_velocity += settings.weight_decay * point.scale + settings.ridge * (point.scale - 1)
        np.multiply(velocity, rate, out=gradient)
        point.factors -= gradient
        point.scale -= rate * scale_velocity


def largest_curvature(problem: Problem, point: Point) -> float:
    """The largest eigenvalue of the Gauss-Newton matrix in W-space, by power iteration from the gradient."""
    rows = problem.tuned
    pre = rows.pre(point)
    curvature = problem.objective.curvature(pre)
    _, vector = problem.objective.value_and_gradient(pre, rows.targets)
    largest = 0.0
    for _ in range(POWER_ITERATIONS):
        moved = rows.overlap @ vector
        square = float(np.vdot(vector, moved))
        if square <= 0:
            break
        image = curvature(moved)
        largest = max(largest, float(np.vdot(image, moved)) / square)
        vector = image / np.sqrt(square)
    return largest or 1.0


# --- closed form -----------------------------------------------------------------------------------------------------


def closed_form(problem: Problem, settings: Settings) -> Iterator[tuple[Point, float]]:
    """Squared loss without activation: (K + mu I) U = Y - Z_0, from the start to ever smaller mu, or to the ridge's own.

    mu = ridge n m / 2 for the mean over n rows and m outputs. One eigendecomposition of K serves all.
    """
    rows = problem.tuned
    residual = rows.targets - rows.base
    yield problem.start, float((residual**2).mean())
    values, vectors = np.linalg.eigh(rows.overlap)
    turned = vectors.T @ residual
    mean = float(values.mean())
    for mu in [settings.ridge * residual.size / 2] if settings.ridge else [share * mean for share in RIDGES]:
        point = Point(1.0, vectors @ (turned / (np.maximum(values, 0) + mu)[:, None]))
        yield point, float(((residual - rows.overlap @ point.factors) ** 2).mean())


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def newton(problem: Problem, settings: Settings) -> Iterator[tuple[Point, float]]:
    """Gauss-Newton with Levenberg and Marquardt's damping: (point, loss) before each step.

    Minimises the loss + ridge / 2 |W - W_0|^2. Ends where no damping makes a step that helps.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); damping times the
    identity, as Levenberg has it, since inputs of a layer have one scale.
    """
    rows, objective = problem.tuned, problem.objective
    is_direct = objective.loss == "mse" and objective.head is not None and _fits(rows, len(objective.head))
    search = _Search.begin(problem, settings.ridge)
    place: _Place | None = search.place(problem.start)
    while place is not None:
        yield place.point, place.loss
        pre = rows.pre(place.point)
        _, gradient = objective.value_and_gradient(pre, rows.targets)
        gradient += settings.ridge * place.point.factors
        solve = _by_gram(problem, pre, place.point, settings) if is_direct else _by_cg(problem, pre, gradient, settings)
        place = search.improved(place, gradient, solve)


@dataclass(frozen=True, slots=True)
class _Place:
    """A point with its loss, and its loss with the ridge."""

    point: Point
    loss: float
    total: float


@dataclass(slots=True)
class _Search:
    """Damped steps until one helps; the damping follows how well the quadratic model foretold the gain."""

    problem: Problem
    ridge: float
    damping: float
    least_damping: float
    least_gain: float

    @classmethod
    def begin(cls, problem: Problem, ridge: float) -> _Search:
        largest = largest_curvature(problem, problem.start) + ridge
        search = cls(problem, ridge, FIRST_DAMPING * largest, LEAST_DAMPING * largest, 0.0)
        search.least_gain = LEAST_GAIN * search.place(problem.start).loss
        return search

    def place(self, point: Point) -> _Place:
        moved = self.problem.tuned.overlap @ point.factors
        loss = self.problem.objective.value(self.problem.tuned.base + moved, self.problem.tuned.targets)
        return _Place(point, loss, loss + self.ridge / 2 * float(np.vdot(point.factors, moved)))

    def improved(self, place: _Place, gradient: Array, solve: Callable[[float], Array]) -> _Place | None:
        """The next place, or None where no damping makes a step that helps."""
        for _ in range(MAX_TRIES):
            step = solve(self.damping)
            trial = self.place(Point(1.0, place.point.factors + step))
            moved = self.problem.tuned.overlap @ step
            promised = (self.damping * float(np.vdot(step, moved)) - float(np.vdot(gradient, moved))) / 2
            self._learn((place.total - trial.total) / promised if promised > 0 else 0.0)
            if trial.total < place.total - self.least_gain:
                return trial
        return None

    def _learn(self, share: float) -> None:
        """Less damping where the promise was kept, more where it was not."""
        factor = SHRINK if share > GOOD else GROW if share < POOR else 1
        self.damping = max(self.damping * factor, self.least_damping)


def _fits(rows: Rows, num_outputs: int) -> bool:
    size = len(rows.base) * num_outputs
    return size <= DIRECT_ROWS and 8 * size * rows.base.shape[1] <= DIRECT_BYTES


def _by_gram(problem: Problem, pre: Array, point: Point, settings: Settings) -> Callable[[float], Array]:
    """The damped step V (n, m) for mse behind a head, from the Gram matrix of the Jacobian, (k n, k n).

    With J_(q,i) = A_qi d_i^T, A_q = H_q o act'(Z), s = 2 / (n k) and t = damping + ridge:

        J J^T  = (A A^T) o K
        alpha  = (J J^T + t / s I)^-1 (r - ridge / t J U)
        V      = - sum_q alpha_q o A_q - ridge / t U
    """
    rows, ridge = problem.tuned, settings.ridge
    jacobian = problem.objective.jacobian(pre)
    num_outputs, num_rows, width = jacobian.shape
    flat = np.ascontiguousarray(jacobian).reshape(num_outputs * num_rows, width)
    gram = flat @ flat.T
    gram *= np.tile(rows.overlap, (num_outputs, num_outputs))
    residual = (problem.objective.outputs(pre) - rows.targets).T.reshape(-1)
    moved = np.einsum("qnm,nm->qn", jacobian, rows.overlap @ point.factors).reshape(-1) if ridge else 0.0
    share = 2 / residual.size

    def make(damping: float) -> Array:
        whole = damping + ridge
        damped = gram + whole / share * np.eye(len(gram))
        alpha = solve_by_cholesky(damped, residual - ridge / whole * moved)
        step = -np.einsum("qn,qnm->nm", alpha.reshape(num_outputs, num_rows), jacobian)
        return np.asarray(step - ridge / whole * point.factors if ridge else step)

    return make


def solve_by_cholesky(matrix: Array, right: Array) -> Array:
    """The solution (N,) of a positive definite system; numpy has the factor, and no solver for a triangle.

    The triangle is solved in blocks: each is a small system, and what is known so far is a product.
    """
    lower: Array = np.linalg.cholesky(matrix).astype(np.float64, copy=False)
    return _solve_lower(lower[::-1, ::-1].T, _solve_lower(lower, right)[::-1])[::-1]


def _solve_lower(lower: Array, right: Array) -> Array:
    solution = right.copy()
    for start in range(0, len(right), TRIANGLE):
        block = slice(start, start + TRIANGLE)
        known = lower[block, :start] @ solution[:start]
        solution[block] = np.linalg.solve(lower[block, block], solution[block] - known)
    return solution


def _by_cg(problem: Problem, pre: Array, gradient: Array, settings: Settings) -> Callable[[float], Array]:
    """The damped step V (n, m) from matrix-free conjugate gradients: (J^T L J + (damping + ridge) I) V = - gradient.

    Inner products are those of W-space, tr(A^T K B), so that the steps are those of dense conjugate gradients.
    """
    curvature = problem.objective.curvature(pre)

    def make(damping: float) -> Array:
        return _conjugate_gradients(curvature, -gradient, problem.tuned.overlap, damping + settings.ridge, settings)

    return make


def _conjugate_gradients(
    curvature: Callable[[Array], Array], right: Array, gram: Array, damping: float, settings: Settings
) -> Array:
    solution, rest = np.zeros_like(right), right.copy()
    moved = gram @ rest
    way, way_moved = rest.copy(), moved.copy()
    square = first = float(np.vdot(rest, moved))
    for _ in range(settings.inner_iterations):
        image = curvature(way_moved) + damping * way
        bend = float(np.vdot(image, way_moved))
        if bend <= 0:
            break
        length = square / bend
        solution += length * way
        rest -= length * image
        moved = gram @ rest
        before, square = square, float(np.vdot(rest, moved))
        if square <= settings.inner_tolerance**2 * first:
            break
        way = rest + square / before * way
        way_moved = moved + square / before * way_moved
    return solution
