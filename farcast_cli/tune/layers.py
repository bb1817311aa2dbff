"""Layers that are tuned, one or several: what they make of rows, and how gradient descent and Gauss-Newton move them.

Every gradient of a layer is a sum of n rank-one terms, sum_i g_i d_i^T, with d_i the inputs of the n rows (or what anchors
leave of them). So all that gradient descent, momentum, weight decay, ridge, conjugate gradients and Gauss-Newton ever
make of W_0 is

    W = c W_0 + U^T D,      Z = X W^T = c Z_0 + K U,      Z_0 = X W_0^T,  K = X D^T

and an iteration moves c, U and Z; W_0 is not touched. There are two forms:

    dual    D = the rows tuned on, K (n, n): a gradient by Z is one by U; <U, V> of W-space is tr(U^T K V); 2 n^2 m a product
    primal  D = a basis of the inputs, K = X (n, m_in): a gradient by U is K^T g; <U, V> is tr(U^T V); 4 n m_in m

The dual form is the cheaper one up to n = 2 m_in, and holds less up to n = m_in. The first layer has fixed inputs, and either
form. The inputs of a later layer move: it has the primal form, with a K that is new in every iteration, and is read twice in
each, for Z and for the derivatives by its inputs.

Source: the claim (pay m^2 once, then less per iteration) is the abstract's of Song, Zhang, Zhang, "Training
Multi-Layer Over-Parametrized Neural Network in Subquadratic Time" (arXiv 2112.07628); the algorithm is our derivation.

Shapes: n rows (those tuned on, then those left out), m outputs of a layer, k outputs of all, r directions; K (n, r), U (r, m),
Z (n, m).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.choices import MOMENTUM
from farcast_cli.tune.objective import activate, slope_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName, SolverName
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.weight import Weight

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
FIRST_RATE, SLOWER, RISEN = 0.5, 0.5, 1.5
"""Of several layers, without a rate of the user's own: the first step aims at half the loss; a loss 1.5 times the best so far
halves the rate."""


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


@dataclass(slots=True)
class Layer:
    """Where a layer is: c and U, and what its inputs make of them."""

    base: Array
    """Z_0; of a later layer nothing, since it is read anew."""
    overlap: Array
    """K; of a later layer its inputs of the last pass."""
    factors: Array
    is_dual: bool = False
    later: Weight | None = None
    scale: float = 1.0

    @classmethod
    def first(cls, base: Array, overlap: Array, *, is_dual: bool = True) -> Layer:
        """At W_0, of its Z_0 and K."""
        return cls(base, overlap, np.zeros((overlap.shape[1], base.shape[1])), is_dual)

    @classmethod
    def moving(cls, weight: Weight) -> Layer:
        """At W_0, with inputs that are yet to come."""
        nothing = np.empty((0, 0))
        return cls(nothing, nothing, np.zeros((weight.num_inputs + bool(weight.bias), weight.num_outputs)), later=weight)

    def forward(self, inputs: Array) -> Array:
        """Z, in memory of its own. The first layer knows its inputs."""
        base = self.base
        if self.later is not None:
            self.overlap = self.later.extended(inputs)
            base = self.later.forward(self.overlap)
        pre = self.overlap @ self.factors
        pre += base if self.scale == 1 else self.scale * base
        return pre

    def backward(self, gradient: Array) -> Array:
        """G W (n, m_in) of a later layer."""
        assert self.later is not None  # noqa: S101 - nobody asks for derivatives by the rows
        through = self.scale * self.later.backward(gradient) + gradient @ self.factors.T
        return through[:, : self.later.num_inputs]

    def by_factors(self, gradient: Array) -> Array:
        """The gradient by U from that by Z of the rows tuned on, (n, m)."""
        return gradient if self.is_dual else self.overlap[: len(gradient)].T @ gradient

    def square(self, factors: Array) -> float:
        """|U^T D|^2."""
        return float(np.vdot(factors, self.overlap[: len(factors)] @ factors if self.is_dual else factors))


@dataclass(slots=True)
class Stack:
    """The layers in forward order, what comes after the last, and the rows: those tuned on come first."""

    layers: list[Layer]
    objective: Objective
    targets: NDArray[Any]
    shares: Array
    """Of the rows tuned on, which sum to 1."""
    between: tuple[ActivationName, ...] = ()
    pres: list[Array] = field(default_factory=list)
    """Z of all layers but the last."""

    @property
    def num_tuned(self) -> int:
        return len(self.shares)

    def forward(self) -> Array:
        """Z of the last layer. One pass over each later layer."""
        pre, self.pres = self.layers[0].forward(np.empty((0, 0))), []
        for layer, name in zip(self.layers[1:], self.between, strict=True):
            self.pres.append(pre)
            pre = layer.forward(activate(name, pre))
        return pre

    def loss(self, losses: Array) -> float:
        """Of the rows tuned on, from those of all."""
        return float(losses[: self.num_tuned] @ self.shares)

    def look(self) -> tuple[Array, Array, float]:
        """Z of the last layer, the losses of all rows, and the loss."""
        last = self.forward()
        losses = self.objective.row_losses(last, self.targets)
        return last, losses, self.loss(losses)

    @property
    def square(self) -> float:
        """|W - W_0|^2, of all layers."""
        return sum(layer.square(layer.factors) for layer in self.layers)

    def backward(self, last: Array) -> list[Array]:
        """What derivatives by the last Z, (n, k, m), are by each layer's. One pass over each later layer."""
        found = [last]
        for layer, pre, name in zip(self.layers[:0:-1], self.pres[::-1], self.between[::-1], strict=True):
            through = layer.backward(found[0].reshape(-1, found[0].shape[-1])).reshape(*last.shape[:2], -1)
            slope = slope_of(name, pre[: self.num_tuned])
            found.insert(0, through if slope is None else through * slope[:, None])
        return found

    def walk(self, settings: Settings, first: Array | None = None) -> Iterator[Array]:
        """The losses of all rows, (n,), before each iteration, without ridge or decay. Ends where one is not finite.

        Args:
            first: U of the first layer, where Gauss-Newton goes from the start, before it steps.
        """
        path = _descend(self, settings) if settings.method == "gradient-descent" else _newton(self, settings, first)
        return islice(path, settings.num_iterations + 1)


# --- gradient descent ------------------------------------------------------------------------------------------------


def _descend(stack: Stack, settings: Settings) -> Iterator[Array]:
    """Full-batch gradient descent as torch.optim.SGD has it: the losses before each step."""
    layers, rate = stack.layers, settings.rate or 0.0
    is_sought = settings.rate is None and len(layers) > 1
    if settings.rate is None and not is_sought:
        rate = 1 / (largest_curvature(stack) + settings.pull)
    motions = [_Motion.at_rest(layer) for layer in layers]
    best, least = [(layer.scale, layer.factors) for layer in layers], np.inf
    while True:
        losses, gradient = stack.objective.losses_and_gradient(stack.forward(), stack.targets, stack.shares)
        loss = stack.loss(losses)
        if is_sought and not loss <= RISEN * least:
            rate *= SLOWER
            for layer, (scale, factors) in zip(layers, best, strict=True):
                layer.scale, layer.factors = scale, factors.copy()
            motions = [_Motion.at_rest(layer) for layer in layers]
            losses, gradient = stack.objective.losses_and_gradient(stack.forward(), stack.targets, stack.shares)
            loss = stack.loss(losses)
        elif is_sought and loss < least:
            best, least = [(layer.scale, layer.factors.copy()) for layer in layers], loss
        if not np.isfinite(loss):
            return
        yield losses
        gradients = [layer.by_factors(one[:, 0]) for layer, one in zip(layers, stack.backward(gradient[:, None]), strict=True)]
        if not rate:
            square = sum(layer.square(one) for layer, one in zip(layers, gradients, strict=True))
            rate = FIRST_RATE * (1 - settings.inertia) * loss / square if square else 1.0
        for motion, one in zip(motions, gradients, strict=True):
            motion.step(one, rate, settings)


@dataclass(slots=True)
class _Motion:
    """A layer and its velocity.

        V <- mu V + grad,  W <- W - rate V,   grad = dL/dW + decay W + ridge (W - W_0)

    In coordinates V = v_c W_0 + V_U^T D, and W - W_0 = (c - 1) W_0 + U^T D.
    """

    layer: Layer
    velocity: Array
    scale_velocity: float = 0.0

    @classmethod
    def at_rest(cls, layer: Layer) -> _Motion:
        return cls(layer, np.zeros_like(layer.factors))

    def step(self, gradient: Array, rate: float, settings: Settings) -> None:
        """One step, of the gradient by U, whose memory is taken over."""
        layer, pull = self.layer, settings.decay + settings.pull
        if pull:
            gradient += pull * layer.factors
        self.velocity *= settings.inertia
        self.velocity += gradient
        self.scale_velocity *= settings.inertia
        self.scale_velocity += settings.decay * layer.scale + settings.pull * (layer.scale - 1)
        np.multiply(self.velocity, rate, out=gradient)
        layer.factors -= gradient
        layer.scale -= rate * self.scale_velocity


def largest_curvature(stack: Stack) -> float:
    """The largest eigenvalue of the Gauss-Newton matrix of one layer at W_0.

    Holds an array like Z and two like U; what else is of the rows' outputs is computed again each time, some rows at a time.
    """
    (layer,), after, num_rows = stack.layers, stack.objective, stack.num_tuned
    base, overlap = layer.base[:num_rows], layer.overlap[:num_rows]

    def product(vector: Array) -> tuple[float, float, Array]:
        factors, square, along = layer.by_factors(vector), 0.0, 0.0
        image = np.empty_like(vector) if layer.is_dual else vector  # in the dual form the factors are the vector
        for part in after.parts(base):
            linear = after.linear(base[part], stack.shares[part])
            moved = overlap[part] @ factors
            square += float(np.vdot(vector[part], moved))
            image[part] = linear.back(linear.curved(linear.forth(moved)))
            along += float(np.vdot(image[part], moved))
        return square, along, image

    _, gradient = after.losses_and_gradient(base.copy(), stack.targets[:num_rows], stack.shares)
    return _largest(gradient, product)


def _largest(vector: Array, product: Callable[[Array], tuple[float, float, Array]]) -> float:
    """The largest eigenvalue of a matrix M by power iteration; `product` gives <v, v>, <v, M v> and M v."""
    largest = 0.0
    for _ in range(POWER_ITERATIONS):
        square, along, image = product(vector)
        if square <= 0:
            break
        largest = max(largest, along / square)
        vector = np.divide(image, np.sqrt(square), out=image)
    return largest or 1.0


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def _newton(stack: Stack, settings: Settings, first: Array | None) -> Iterator[Array]:
    """Gauss-Newton with Levenberg and Marquardt's damping: the losses before each step.

    Minimises the loss + ridge / 2 |W - W_0|^2. Ends where no damping makes a step that helps. One pass over each later layer
    for the derivatives, and one for each step that is tried.

    Source: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963); damping times the
    identity, as Levenberg has it, since inputs of a layer have one scale.
    """
    last, losses, loss = stack.look()
    damping, least_gain = None, LEAST_GAIN * loss
    while np.isfinite(loss):
        yield losses
        model = _Model.of(stack, last, settings)
        damping = damping or Damping.begin(model.largest_curvature() + settings.pull)
        if first is not None:
            stack.layers[0].factors, first = first, None
            last, losses, loss = stack.look()
            continue
        for _ in range(MAX_TRIES):
            promised = model.step(damping.value)
            last, losses, new = stack.look()
            gain = loss - new + settings.pull / 2 * (model.square - stack.square if settings.pull else 0.0)
            damping.learn(gain / promised if promised > 0 else 0.0)
            if gain > least_gain:
                break
        else:
            model.go_back()
            return
        loss = new


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


@dataclass(frozen=True, slots=True)
class _Part:
    """What a layer at a place adds to J, the derivatives of the outputs by all layers: A^T K for each row."""

    layer: Layer
    factors: Array
    overlap: Array
    """Of the rows tuned on."""
    forth: Callable[[Array], Array]
    """What A (n, k, m) makes of a direction of Z, (n, k); and below of outputs, (n, m)."""
    back: Callable[[Array], Array]
    kernel: Array | None
    """D D^T (n, n) of the rows; None in the primal form of many rows."""

    @classmethod
    def of(cls, layer: Layer, num_rows: int, forth: Callable[[Array], Array], back: Callable[[Array], Array]) -> _Part:
        overlap = layer.overlap[:num_rows]
        is_short = num_rows <= 2 * overlap.shape[1]
        kernel = overlap if layer.is_dual else overlap @ overlap.T if is_short else None
        return cls(layer, layer.factors, overlap, forth, back, kernel)

    def gram(self, outputs: Array) -> Array:
        """J J^T of outputs, (n, k)."""
        by_pre = self.back(outputs)
        return self.forth(self.overlap @ (self.overlap.T @ by_pre) if self.kernel is None else self.kernel @ by_pre)

    def step(self, outputs: Array, share: float) -> None:
        """Move by -(J^T of outputs) and back by a share of what the layer has gone."""
        by_pre = self.back(outputs)
        step = by_pre if self.layer.is_dual else self.overlap.T @ by_pre
        self.layer.factors = (1 - share) * self.factors - step


@dataclass(frozen=True, slots=True)
class _Model:
    """The quadratic model of the loss at a place, in the space of the outputs.

    With the derivatives J of the outputs by all layers, the curvature L of the loss by the outputs and its gradient g,
    V = W - W_0, G = J J^T, and mu = damping + ridge, the damped step is

        (J^T L J + mu) step = -(J^T g + ridge V)
        step = -(J^T c + ridge / mu V),    (L G + mu) c = g - ridge / mu L J V

    L G + mu is symmetric in the inner product <c, G c'>, which is that of J^T c in W-space. So these conjugate gradients are those
    of W-space. G is a sum over the layers, (A A^T) o (H H^T), and is not made.
    """

    parts: list[_Part]
    gradient: Array
    """g (n, k), and below J V and the square of V, where there is a ridge."""
    along: Array
    square: float
    curved: Callable[[Array], Array]
    """What L makes of outputs (n, k)."""
    settings: Settings

    @classmethod
    def of(cls, stack: Stack, last: Array, settings: Settings) -> _Model:
        """Of the last layer's Z."""
        num_rows, after = stack.num_tuned, stack.objective
        pre = last[:num_rows]
        linear = after.linear(pre, stack.shares)
        gradient = after.gradient(pre, stack.targets[:num_rows], stack.shares)
        parts = [_Part.of(stack.layers[-1], num_rows, linear.forth, linear.back)]
        if len(stack.layers) > 1:
            for layer, way in zip(stack.layers, stack.backward(after.jacobian(pre))[:-1], strict=False):
                forth = partial(np.einsum, "nkm,nm->nk", way)
                back = partial(np.einsum, "nkm,nk->nm", way)
                parts.append(_Part.of(layer, num_rows, forth, back))
        along, square = np.zeros_like(gradient), 0.0
        if settings.pull:
            along = sum((part.forth(part.overlap @ part.factors) for part in parts), along)
            square = stack.square
        return cls(parts, gradient, along, square, linear.curved, settings)

    def gram(self, outputs: Array) -> Array:
        """G of outputs (n, k)."""
        first, *others = (part.gram(outputs) for part in self.parts)
        return sum(others, first)

    def largest_curvature(self) -> float:
        """The largest eigenvalue of J^T L J."""

        def product(outputs: Array) -> tuple[float, float, Array]:
            moved = self.gram(outputs)
            bent = self.curved(moved)
            return float(np.vdot(outputs, moved)), float(np.vdot(bent, moved)), bent

        return _largest(self.gradient, product)

    def step(self, damping: float) -> float:
        """Make the damped step from the place; returns the gain that it promises, which is half of damping |step|^2 - <gradient, step>."""
        pull = self.settings.pull
        share = pull / (damping + pull)
        c = self._solved(damping + pull, self.gradient - share * self.curved(self.along) if pull else self.gradient)
        moved = self.gram(c)
        for part in self.parts:
            part.step(c, share)
        along = float(np.vdot(c, self.along))
        step = float(np.vdot(c, moved)) + 2 * share * along + share**2 * self.square
        slope = float(np.vdot(self.gradient, moved + share * self.along)) + pull * (along + share * self.square)
        return (damping * step + slope) / 2

    def go_back(self) -> None:
        """To the place."""
        for part in self.parts:
            part.layer.factors = part.factors

    def _solved(self, mu: float, right: Array) -> Array:
        """The coefficients c (n, k) by conjugate gradients."""
        solution, rest = np.zeros_like(right), right.copy()
        moved = self.gram(rest)
        way, way_moved = rest.copy(), moved.copy()
        square = first = float(np.vdot(rest, moved))
        for _ in range(self.settings.inner_iterations):
            image = self.curved(way_moved) + mu * way
            bend = float(np.vdot(image, way_moved))
            if bend <= 0:
                break
            length = square / bend
            solution += length * way
            rest -= length * image
            moved = self.gram(rest)
            before, square = square, float(np.vdot(rest, moved))
            if square <= self.settings.inner_tolerance**2 * first:
                break
            way = rest + square / before * way
            way_moved = moved + square / before * way_moved
        return solution
