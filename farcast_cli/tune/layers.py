"""Several layers at once, by gradient descent: the inputs of all but the first move.

The first layer has fixed inputs, so its change has the form of `one_layer`. Every later layer is read twice an iteration,
once for Z and once for the gradient by its inputs, and its change is held whole: with moving inputs it has no low rank.

Shapes: n rows (those tuned on, then those left out); X (n, m_in), Z, G (n, m_out), U (r, m_out).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.tune.objective import activate, slope_of

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
        factors = self.by_factors(gradient)
        inner = factors if self.overlap is None else self.overlap[: len(factors)] @ factors
        return float(np.vdot(factors, inner))

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
class Descent:
    """A descent under way: the layers in forward order, the activations between them, what comes after, and the targets."""

    layers: list[Layer]
    between: tuple[ActivationName, ...]
    objective: Objective
    targets: NDArray[Any]
    settings: Settings
    num_tuned: int
    shares: Array | None = None
    """Of the rows tuned on."""
    rate: float = 0.0
    pres: list[Array] = field(default_factory=list)

    def walk(self) -> Iterator[Array]:
        """The losses of all rows, (n,), before each step. Ends where one of the rows tuned on is not finite."""
        best, least = [layer.place() for layer in self.layers], np.inf
        for _ in range(self.settings.num_iterations + 1):
            loss, losses = self._forward()
            if self.settings.rate is None and not loss <= RISEN * least:
                self.rate *= SLOWER
                for layer, to in zip(self.layers, best, strict=True):
                    layer.go_back(to)
                loss, losses = self._forward()
            elif loss < least:
                best, least = [layer.place() for layer in self.layers], loss
            if not np.isfinite(loss):
                return
            yield losses
            self._step()

    def _forward(self) -> tuple[float, Array]:
        hidden, self.pres = np.empty((0, 0)), []
        for layer, name in zip(self.layers, (*self.between, None), strict=True):
            self.pres.append(layer.forward(hidden))
            if name is not None:
                hidden = activate(name, self.pres[-1])
        losses = self.objective.row_losses(self.pres[-1], self.targets)
        tuned = losses[: self.num_tuned]
        return float(tuned.mean() if self.shares is None else tuned @ self.shares), losses

    def _step(self) -> None:
        """All gradients by the weights as they are, then all steps."""
        tuned = slice(self.num_tuned)
        loss, gradient = self.objective.value_and_gradient(self.pres[-1][tuned], self.targets[tuned], self.shares)
        gradients = [gradient]
        for number in range(len(self.layers) - 1, 0, -1):
            through = self.layers[number].backward(gradients[0])
            slope = slope_of(self.between[number - 1], self.pres[number - 1][tuned])
            gradients.insert(0, through if slope is None else through * slope)
        rate = self.settings.rate or self._found_rate(loss, gradients)
        for layer, one in zip(self.layers, gradients, strict=True):
            layer.step(one, rate, self.settings)

    def _found_rate(self, loss: float, gradients: list[Array]) -> float:
        if not self.rate:
            square = sum(layer.square_of(one) for layer, one in zip(self.layers, gradients, strict=True))
            self.rate = FIRST_RATE * (1 - self.settings.inertia) * loss / square if square else 1.0
        return self.rate
