"""Several layers at once, by Gauss-Newton or gradient descent: the inputs of all but the first move.

The first layer has fixed inputs, so its change has the form of `one_layer`. Every later layer is read twice an iteration,
once for Z and once for the derivatives by its inputs, and its change is held whole: with moving inputs it has no low rank.

Shapes: n rows (those tuned on, then those left out), k outputs; X (n, m_in), Z (n, m_out), A (n, k, m_out), U (r, m_out).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.tune.objective import activate, mean_of, slope_of
from farcast_cli.tune.one_layer import LEAST_GAIN, MAX_TRIES, POWER_ITERATIONS, Damping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.one_layer import Settings
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

FIRST_RATE, SLOWER, RISEN = 0.5, 0.5, 1.5
"""Without a rate of the user's own: the first step aims at half the loss; a loss 1.5 times the best so far halves the rate."""


@dataclass(slots=True)
class Layer:
    """Where a layer is: W = c W_0 + U^T D, with D the rows tuned on for the first layer, and no D for a later one."""

    weight: Weight
    overlap: Array | None
    """The first layer's X D^T (n, r), and below its Z_0."""
    base: Array
    scale: float
    factors: Array
    velocity: Array
    scale_velocity: float = 0.0
    inputs: Array = field(default_factory=lambda: np.empty((0, 0)))

    @classmethod
    def at_start(cls, weight: Weight, inputs: Array | None, num_tuned: int) -> Layer:
        """Of the first layer's inputs; None for a later layer."""
        num_directions = num_tuned if inputs is not None else weight.num_inputs + bool(weight.bias)
        zeros = np.zeros((num_directions, weight.num_outputs))
        if inputs is None:
            return cls(weight, None, np.empty((0, 0)), 1.0, zeros, zeros.copy())
        extended = weight.extended(inputs)
        return cls(weight, extended @ extended[:num_tuned].T, weight.forward(extended), 1.0, zeros, zeros.copy())

    def forward(self, inputs: Array) -> Array:
        """Z (n, m_out)."""
        if self.overlap is not None:
            return self.scale * self.base + self.overlap @ self.factors
        self.inputs = self.weight.extended(inputs)
        return self.scale * self.weight.forward(self.inputs) + self.inputs @ self.factors

    def backward(self, gradient: Array) -> Array:
        """G W (n, m_in), of W as it is before the step."""
        through = self.scale * self.weight.backward(gradient) + gradient @ self.factors.T
        return through[:, : self.weight.num_inputs]

    def by_factors(self, gradient: Array) -> Array:
        """The gradient by U (r, m_out) from that by Z (n, m_out)."""
        return gradient if self.overlap is not None else self.inputs[: len(gradient)].T @ gradient

    def square_of(self, gradient: Array) -> float:
        """The squared norm of the gradient by W."""
        return self._square(self.by_factors(gradient))

    @property
    def square(self) -> float:
        """|U^T D|^2."""
        return self._square(self.factors)

    def _square(self, factors: Array) -> float:
        inner = factors if self.overlap is None else self.overlap[: len(factors)] @ factors
        return float(np.vdot(factors, inner))

    def kernel(self, num_rows: int) -> Array:
        """H H^T (n, n) of the inputs of the first rows."""
        inputs = self.inputs[:num_rows]
        return inputs @ inputs.T if self.overlap is None else self.overlap[:num_rows]

    def change(self, num_rows: int) -> Array:
        """What the change of W adds to Z (n, m_out) of the first rows."""
        return (self.inputs if self.overlap is None else self.overlap)[:num_rows] @ self.factors

    def step(self, gradient: Array, rate: float, settings: Settings) -> None:
        """One step of gradient descent with momentum, in coordinates."""
        self.velocity *= settings.inertia
        self.velocity += self.by_factors(gradient) + (settings.decay + settings.pull) * self.factors
        self.scale_velocity *= settings.inertia
        self.scale_velocity += settings.decay * self.scale + settings.pull * (self.scale - 1)
        self.factors -= rate * self.velocity
        self.scale -= rate * self.scale_velocity

    def place(self) -> tuple[float, Array]:
        return self.scale, self.factors.copy()

    def go_back(self, to: tuple[float, Array]) -> None:
        """To where it was, at rest."""
        self.scale, self.factors = to[0], to[1].copy()
        self.velocity, self.scale_velocity = np.zeros_like(self.factors), 0.0


@dataclass(slots=True)
class Stack:
    """The layers in forward order, the activations between them, what comes after, and the rows: those tuned on come first."""

    layers: list[Layer]
    between: tuple[ActivationName, ...]
    objective: Objective
    targets: NDArray[Any]
    num_tuned: int
    shares: Array | None = None
    """Of the rows tuned on."""
    pres: list[Array] = field(default_factory=list)

    def forward(self) -> tuple[float, Array]:
        """The loss of the rows tuned on, and those of all rows, (n,). One pass over each later layer."""
        hidden, self.pres = np.empty((0, 0)), []
        for layer, name in zip(self.layers, (*self.between, None), strict=True):
            self.pres.append(layer.forward(hidden))
            if name is not None:
                hidden = activate(name, self.pres[-1])
        losses = self.objective.row_losses(self.pres[-1], self.targets)
        return mean_of(losses[: self.num_tuned], self.shares), losses

    def backward(self, last: Array) -> list[Array]:
        """What derivatives by the last Z, (n, k, m), are by each layer's, as the weights are. One pass over each later layer."""
        found = [last]
        for number in range(len(self.layers) - 1, 0, -1):
            flat = found[0].reshape(-1, found[0].shape[-1])
            through = self.layers[number].backward(flat).reshape(*last.shape[:2], -1)
            slope = slope_of(self.between[number - 1], self.pres[number - 1][: self.num_tuned])
            found.insert(0, through if slope is None else through * slope[:, None])
        return found

    def walk(self, settings: Settings) -> Iterator[Array]:
        """The losses of all rows, (n,), before each step. Ends where one of the rows tuned on is not finite."""
        path = _descend(self, settings) if settings.method == "gradient-descent" else _newton(self, settings)
        return islice(path, settings.num_iterations + 1)


def _descend(stack: Stack, settings: Settings) -> Iterator[Array]:
    """Gradient descent: the losses before each step."""
    best, least, rate = [layer.place() for layer in stack.layers], np.inf, settings.rate or 0.0
    while True:
        loss, losses = stack.forward()
        if settings.rate is None and not loss <= RISEN * least:
            rate *= SLOWER
            for layer, to in zip(stack.layers, best, strict=True):
                layer.go_back(to)
            loss, losses = stack.forward()
        elif loss < least:
            best, least = [layer.place() for layer in stack.layers], loss
        if not np.isfinite(loss):
            return
        yield losses
        tuned = slice(stack.num_tuned)
        _, by_last = stack.objective.value_and_gradient(stack.pres[-1][tuned], stack.targets[tuned], stack.shares)
        gradients = [one[:, 0] for one in stack.backward(by_last[:, None])]
        if not rate:
            square = sum(layer.square_of(one) for layer, one in zip(stack.layers, gradients, strict=True))
            rate = FIRST_RATE * (1 - settings.inertia) * loss / square if square else 1.0
        for layer, one in zip(stack.layers, gradients, strict=True):
            layer.step(one, rate, settings)


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def _newton(stack: Stack, settings: Settings) -> Iterator[Array]:
    """Gauss-Newton with Levenberg's damping, as `one_layer.newton` has it: the losses before each step.

    The Jacobian J of the outputs has n k rows, and a x h^T for each layer, a the derivative by Z. So its Gram matrix is

        G = J J^T = sum over layers of (A A^T) o (H H^T),    n k x n k

    and the damped step solves one system of this size, exactly. L is the curvature of the loss by the outputs, g its gradient,
    V = W - W_0, mu = damping + ridge:

        (J^T L J + mu) step = -(J^T g + ridge V)
        step = -(J^T c + ridge / mu V),    (L G + mu) c = g - ridge / mu L J V

    One pass over each later layer for A, and one for each step that is tried.
    """
    loss, losses = stack.forward()
    damping, least_gain = None, LEAST_GAIN * loss
    while np.isfinite(loss):
        yield losses
        bent = _Bent.of(stack, settings.pull)
        damping = damping or Damping.begin(bent.largest_curvature() + settings.pull)
        before = [(layer.place(), layer.inputs) for layer in stack.layers]
        for _ in range(MAX_TRIES):
            gammas = bent.solved(damping.value)
            promised = bent.promised(gammas, damping.value)
            bent.move(gammas, damping.value)
            new, losses = stack.forward()
            gain = loss - new + settings.pull / 2 * (bent.square - sum(layer.square for layer in stack.layers))
            damping.learn(gain / promised if promised > 0 else 0.0)
            if gain > least_gain:
                break
            for layer, (to, inputs) in zip(stack.layers, before, strict=True):
                layer.go_back(to)
                layer.inputs = inputs
        else:
            return
        loss = new


@dataclass(frozen=True, slots=True)
class _Bent:
    """The quadratic model of the loss at a place; N = n k numbers for the outputs of the rows tuned on."""

    layers: list[Layer]
    ways: list[Array]
    """A (n, k, m) of each layer."""
    gram: Array
    """G (N, N), and below L G."""
    curved: Array
    gradient: Array
    """g (N,), and below J V and L J V, (N,), and the square of V."""
    along: Array
    along_curved: Array
    square: float
    pull: float

    @classmethod
    def of(cls, stack: Stack, pull: float) -> _Bent:
        num_rows = stack.num_tuned
        pre = stack.pres[-1][:num_rows]
        gradient, curvature = stack.objective.by_outputs(pre, stack.targets[:num_rows], stack.shares)
        ways = stack.backward(stack.objective.jacobian(pre))
        size, shape = gradient.size, (num_rows, gradient.shape[1])
        gram, along = np.zeros((size, size)), np.zeros(size)
        for layer, way in zip(stack.layers, ways, strict=True):
            flat = way.reshape(size, -1)
            part = (flat @ flat.T).reshape(*shape, *shape)
            part *= layer.kernel(num_rows)[:, None, :, None]
            gram += part.reshape(size, size)
            if pull:
                along += np.einsum("nkm,nm->nk", way, layer.change(num_rows)).ravel()

        def curved(columns: Array) -> Array:
            return curvature(columns.reshape(*shape, -1)).reshape(columns.shape)

        square = sum(layer.square for layer in stack.layers) if pull else 0.0
        return cls(stack.layers, ways, gram, curved(gram), gradient.ravel(), along, curved(along), square, pull)

    def largest_curvature(self) -> float:
        """The largest eigenvalue of J^T L J, by power iteration from the gradient."""
        vector, largest = self.gradient, 0.0
        for _ in range(POWER_ITERATIONS):
            moved = self.gram @ vector
            square = float(vector @ moved)
            if square <= 0:
                break
            image = self.curved @ vector
            largest = max(largest, float(image @ moved) / square)
            vector = image / np.sqrt(square)
        return largest or 1.0

    def solved(self, damping: float) -> Array:
        """The coefficients c (N,) of a step."""
        mu = damping + self.pull
        system = self.curved.copy()
        system.flat[:: len(system) + 1] += mu
        return np.asarray(np.linalg.solve(system, self.gradient - self.pull / mu * self.along_curved))

    def promised(self, c: Array, damping: float) -> float:
        """Half of damping |step|^2 - <gradient, step>."""
        share = self.pull / (damping + self.pull)
        moved = self.gram @ c
        step = float(c @ moved) + 2 * share * float(c @ self.along) + share**2 * self.square
        slope = self.gradient @ (moved + share * self.along) + self.pull * (c @ self.along + share * self.square)
        return (damping * step + float(slope)) / 2

    def move(self, c: Array, damping: float) -> None:
        """Make the step."""
        coefficients = c.reshape(self.ways[0].shape[:2])
        for layer, way in zip(self.layers, self.ways, strict=True):
            layer.factors *= 1 - self.pull / (damping + self.pull)
            layer.factors -= layer.by_factors(np.einsum("nk,nkm->nm", coefficients, way))
