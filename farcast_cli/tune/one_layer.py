"""One layer, exactly, at a cost per iteration that does not know the layer's size m^2.

Every gradient of a layer is a sum of n rank-one terms, sum_i g_i d_i^T, with d_i the inputs of the n rows (or what anchors
leave of them). So all that gradient descent, momentum, weight decay, ridge, conjugate gradients and Gauss-Newton ever
make of W_0 is

    W = c W_0 + U^T D,      Z = X W^T = c Z_0 + K U,      Z_0 = X W_0^T,  K = X D^T

and an iteration moves c, U and Z; W_0 is not touched. There are two forms:

    dual    D = the rows tuned on, K (n, n): a gradient by Z is one by U; <U, V> of W-space is tr(U^T K V); 2 n^2 m a product
    primal  D = a basis of the inputs, K = X (n, m_in): a gradient by U is K^T g; <U, V> is tr(U^T V); 4 n m_in m

The dual form is the cheaper one up to n = 2 m_in, and holds less up to n = m_in.

Source: the claim (pay m^2 once, then less per iteration) is the abstract's of Song, Zhang, Zhang, "Training
Multi-Layer Over-Parametrized Neural Network in Subquadratic Time" (arXiv 2112.07628); the algorithm is our derivation.

Shapes: n rows tuned on, m outputs of the layer, r directions; X (n, m_in), D (r, m_in), U (r, m), Z (n, m), K (n, r).
"""

from __future__ import annotations

from dataclasses import dataclass
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
"""Iterations without a better loss on rows that are left out, after which a method ends."""
CG_ITERATIONS, CG_TOLERANCE = 40, 1e-3
"""Of an inner solve: a tighter one changes the path, and neither where it ends nor how soon."""
POWER_ITERATIONS = 12
FIRST_DAMPING = 1.0
"""Of the largest curvature. From there the rows left out choose on a finer path than from 0.001. Labels of unseen
characters: a loss of 2.94 against 3.05, and beside anchors 3.46 against none. Targets as noisy as they are large: of 25
tunings that should help 25 begin and 2 do harm, against 11 and 8. Some six iterations more are the price."""
LEAST_DAMPING = 1e-6  # of the largest curvature; below, a step amplifies rounding
LEAST_GAIN = 1e-13  # of the first loss; a step that gains less gains rounding
SHRINK, GROW, MAX_TRIES = 1 / 3, 4.0, 15
GOOD, POOR = 0.75, 0.25
"""Of the gain that the quadratic model promises: above the first the damping shrinks, below the second it grows."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows by all that is needed of them: Z_0 (n, m), K (n, r), the targets, (n, k) or labels (n,), and the shares (n,)."""

    base: Array
    overlap: Array
    targets: NDArray[Any]
    shares: Array | None = None

    def pre(self, point: Point, part: slice = slice(None)) -> Array:
        """Pre-activations at a point, (n, m); of some of the rows."""
        pre = self.overlap[part] @ point.factors
        pre += self.base[part] if point.scale == 1 else point.scale * self.base[part]
        return pre


@dataclass(slots=True)
class Point:
    """Where W is: c and U (r, m)."""

    scale: float
    factors: Array


@dataclass(frozen=True, slots=True)
class Problem:
    """The rows tuned on, in which form, and what is made small."""

    objective: Objective
    rows: Rows
    is_dual: bool = True

    @property
    def start(self) -> Point:
        return Point(1.0, np.zeros((self.rows.overlap.shape[1], self.rows.base.shape[1])))

    def value(self, pre: Array) -> float:
        return self.objective.value(pre, self.rows.targets, self.rows.shares)

    def value_and_gradient(self, pre: Array) -> tuple[float, Array]:
        """The loss, and its gradient by U; the pre-activations' memory is taken over."""
        loss, gradient = self.objective.value_and_gradient(pre, self.rows.targets, self.rows.shares)
        return loss, self._by_factors(gradient)

    def curvature(self, pre: Array) -> Callable[[Array], Array]:
        """What the Gauss-Newton matrix makes of a direction that is given by its K V."""
        by_pre = self.objective.curvature(pre, self.rows.shares)
        return lambda moved: self._by_factors(by_pre(moved))

    def inner(self, one: Array, other: Array, moved: Array) -> float:
        """<U, V> of W-space; `moved` is K V."""
        return float(np.vdot(one, moved if self.is_dual else other))

    def _by_factors(self, gradient: Array) -> Array:
        return gradient if self.is_dual else self.rows.overlap.T @ gradient


@dataclass(frozen=True, slots=True)
class Settings:
    """How to tune. `ridge` pulls towards W_0, `weight_decay` towards 0; a rate of None is found from the curvature.

    A ridge of None is chosen by rows left out where there is a closed form, and is 0 elsewhere.
    """

    method: SolverName = "gauss-newton"
    iterations: int | None = None
    rate: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    ridge: float | None = None
    inner_iterations: int = CG_ITERATIONS
    inner_tolerance: float = CG_TOLERANCE

    @property
    def num_iterations(self) -> int:
        return ITERATIONS[self.method] if self.iterations is None else self.iterations

    @property
    def pull(self) -> float:
        """Towards W_0."""
        return self.ridge or 0.0

    @property
    def decay(self) -> float:
        return self.weight_decay or 0.0

    @property
    def inertia(self) -> float:
        """The momentum."""
        return MOMENTUM if self.momentum is None else self.momentum


def walk(problem: Problem, settings: Settings, first: Point | None = None) -> Iterator[tuple[Point, float]]:
    """The path of a method: (point, loss) before each iteration, without ridge or decay. It ends where the loss is not finite.

    Args:
        first: where Gauss-Newton goes from the start, before it steps.
    """
    path = descend(problem, settings) if settings.method == "gradient-descent" else newton(problem, settings, first)
    for iteration, (point, loss) in enumerate(path):
        if not np.isfinite(loss):
            return
        yield point, loss
        if iteration >= settings.num_iterations:
            return


# --- gradient descent ------------------------------------------------------------------------------------------------


def descend(problem: Problem, settings: Settings) -> Iterator[tuple[Point, float]]:
    """Full-batch gradient descent as torch.optim.SGD has it: (point, loss) before each step.

        V <- mu V + grad,  W <- W - rate V,   grad = dL/dW + decay W + ridge (W - W_0)

    In coordinates V = v_c W_0 + V_U^T D, and W - W_0 = (c - 1) W_0 + U^T D.
    """
    point, velocity, scale_velocity = problem.start, np.zeros_like(problem.start.factors), 0.0
    pull = settings.decay + settings.pull
    rate = settings.rate
    while True:
        loss, gradient = problem.value_and_gradient(problem.rows.pre(point))
        yield point, loss
        if rate is None:
            rate = 1 / (largest_curvature(problem) + pull)
        if pull:
            gradient += pull * point.factors
        velocity *= settings.inertia
        velocity += gradient
        scale_velocity *= settings.inertia
        scale_velocity += settings.decay * point.scale + settings.pull * (point.scale - 1)
        np.multiply(velocity, rate, out=gradient)
        point.factors -= gradient
        point.scale -= rate * scale_velocity


def largest_curvature(problem: Problem) -> float:
    """The largest eigenvalue of the Gauss-Newton matrix in W-space, at the start, by power iteration from the gradient.

    Holds two arrays like U; what is of the rows' outputs is computed again each time, some rows at a time.
    """
    rows, objective = problem.rows, problem.objective
    shares = np.full(len(rows.base), 1 / len(rows.base)) if rows.shares is None else rows.shares
    _, vector = problem.value_and_gradient(rows.pre(problem.start))
    image, largest = np.empty_like(vector), 0.0
    for _ in range(POWER_ITERATIONS):
        square = along = 0.0
        image[:] = 0
        for part in objective.parts(rows.base):
            moved = rows.overlap[part] @ vector
            bent = objective.curvature(rows.base[part], shares[part])(moved)
            along += float(np.vdot(bent, moved))
            square += float(np.vdot(vector[part], moved)) if problem.is_dual else 0.0
            if problem.is_dual:
                image[part] = bent
            else:
                image += rows.overlap[part].T @ bent
        square = square if problem.is_dual else float(np.vdot(vector, vector))
        if square <= 0:
            break
        largest = max(largest, along / square)
        np.divide(image, np.sqrt(square), out=vector)
    return largest or 1.0


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def newton(problem: Problem, settings: Settings, first: Point | None = None) -> Iterator[tuple[Point, float]]:
    """Gauss-Newton with Levenberg and Marquardt's damping: (point, loss) before each step.

    Minimises the loss + ridge / 2 |W - W_0|^2. Ends where no damping makes a step that helps.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); damping times the
    identity, as Levenberg has it, since inputs of a layer have one scale.
    """
    search = _Search.begin(problem, settings)
    place: _Place | None = search.place(problem.start)
    if first is not None and place is not None:
        yield place.point, place.loss
        place = search.place(first)
    while place is not None:
        yield place.point, place.loss
        place = search.improved(place)


@dataclass(frozen=True, slots=True)
class _Place:
    """A point with its loss, and its loss with the ridge."""

    point: Point
    loss: float
    total: float


@dataclass(slots=True)
class Damping:
    """Follows how well the quadratic model foretold the gain."""

    value: float
    least: float

    @classmethod
    def begin(cls, largest_curvature: float) -> Damping:
        return cls(FIRST_DAMPING * largest_curvature, LEAST_DAMPING * largest_curvature)

    def learn(self, share: float) -> None:
        """Less where the promise was kept, more where it was not."""
        factor = SHRINK if share > GOOD else 1 if share >= POOR else GROW  # a share that is NaN grows it
        self.value = max(self.value * factor, self.least)


@dataclass(slots=True)
class _Search:
    """Damped steps until one helps."""

    problem: Problem
    settings: Settings
    damping: Damping
    least_gain: float

    @classmethod
    def begin(cls, problem: Problem, settings: Settings) -> _Search:
        largest = largest_curvature(problem) + settings.pull
        search = cls(problem, settings, Damping.begin(largest), 0.0)
        search.least_gain = LEAST_GAIN * search.place(problem.start).loss
        return search

    def place(self, point: Point) -> _Place:
        moved = self.problem.rows.overlap @ point.factors
        loss = self.problem.value(self.problem.rows.base + moved)
        return _Place(point, loss, loss + self.settings.pull / 2 * self.problem.inner(point.factors, point.factors, moved))

    def improved(self, place: _Place) -> _Place | None:
        """The next place, or None where no damping makes a step that helps."""
        pre = self.problem.rows.pre(place.point)
        curvature = self.problem.curvature(pre)
        _, gradient = self.problem.value_and_gradient(pre)
        gradient += self.settings.pull * place.point.factors
        for _ in range(MAX_TRIES):
            step = self._solved(curvature, gradient)
            trial = self.place(Point(1.0, place.point.factors + step))
            moved = self.problem.rows.overlap @ step
            inner = self.problem.inner
            promised = (self.damping.value * inner(step, step, moved) - inner(gradient, step, moved)) / 2
            self.damping.learn((place.total - trial.total) / promised if promised > 0 else 0.0)
            if trial.total < place.total - self.least_gain:
                return trial
        return None

    def _solved(self, curvature: Callable[[Array], Array], gradient: Array) -> Array:
        """The damped step V (r, m) by conjugate gradients: (J^T L J + (damping + ridge) I) V = - gradient.

        L is the curvature of the loss by the outputs. Products and inner products are those of W-space.
        """
        overlap, inner, damping = self.problem.rows.overlap, self.problem.inner, self.damping.value + self.settings.pull
        solution, rest = np.zeros_like(gradient), -gradient
        moved = overlap @ rest
        way, way_moved = rest.copy(), moved.copy()
        square = first = inner(rest, rest, moved)
        for _ in range(self.settings.inner_iterations):
            image = curvature(way_moved) + damping * way
            bend = inner(image, way, way_moved)
            if bend <= 0:
                break
            length = square / bend
            solution += length * way
            rest -= length * image
            moved = overlap @ rest
            before, square = square, inner(rest, rest, moved)
            if square <= self.settings.inner_tolerance**2 * first:
                break
            way = rest + square / before * way
            way_moved = moved + square / before * way_moved
        return solution
