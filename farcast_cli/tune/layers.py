"""Several layers at once: the inputs of all but the first move, so what W_0 makes of them is cached and refreshed.

    W = c W_0 + U^T Q,     x = C Q + residual,     x W^T = C (c Q W_0^T + U) + residual W^T

Q is an orthonormal basis of the inputs seen so far, and Q W_0^T is read off W_0 once for each new direction. While the
residual stays below a tolerance it is dropped, and an iteration does not touch W_0. The way back, g W, is cached alike
on a basis of the gradients seen. A layer whose bases have grown so far that they cost as much as W_0 falls back to exact
products with W_0.

The first layer's inputs are fixed: there Q is x itself, C is the identity, and nothing is ever dropped.

Source: the case of several layers is the abstract's of arXiv 2112.07628; cache and tolerance are our derivation.

Shapes: n rows (those tuned on, then those that stop early), r directions; X (n, m_in), Z, G (n, m_out), U (r, m_out).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.tune.delta import Delta
from farcast_cli.tune.objective import activate, slope_of
from farcast_cli.tune.one_layer import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.one_layer import Settings
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

TOLERANCE = 0.005
"""Of the rows' root-mean-square length: what is dropped of the inputs and the gradients. It is not random, but lies along the
gradient: for 16 rows the loss on its way is off by up to 4 % of the first one (0.02: 6 %, 0.0003: 0.5 %); it ends right. For
150 rows (GELU, m = 2048) 60 iterations end at the exact loss with 59 passes of 120 (0.02: 16 passes, a loss 8 % larger; 0.0003:
100 passes)."""
MAX_BASIS_BYTES = 128 << 20  # of a layer's basis with its product, or with U where there is no product any more
FIRST_RATE, SLOWER, RISEN = 0.5, 0.5, 1.5
"""Without a rate of the user's own: the first step aims at half the loss; a loss 1.5 times the best so far halves the rate."""


@dataclass(slots=True)
class RowBasis:
    """An orthonormal basis (r, m) of the rows seen, and what W_0 makes of it (r, m')."""

    width: int
    product: Callable[[Array], Array]
    directions: Array
    products: Array
    tolerance: float
    num_refreshes: int = 0
    is_exact: bool = False
    """Whether products with W_0 are no longer cached."""

    @classmethod
    def empty(cls, width: int, other: int, product: Callable[[Array], Array], tolerance: float) -> RowBasis:
        return cls(width, product, np.empty((0, width)), np.empty((0, other)), tolerance)

    def multiply(self, rows: Array) -> tuple[Array, Array]:
        """Coordinates C (n, r) of rows, and what W_0 makes of the rows (n, m'), extending the basis where it must."""
        coordinates = self._cover(rows)
        return coordinates, self.product(rows) if self.is_exact else coordinates @ self.products

    def through(self, rows: Array) -> Array:
        """What W_0 makes of the rows (n, m'), for one who needs no coordinates."""
        return self.product(rows) if self.is_exact else self.multiply(rows)[1]

    def give_up_products(self) -> None:
        """From here on products are exact; the directions stay, since what was made of them stays."""
        self.is_exact, self.products = True, self.products[:0].copy()

    def _cover(self, rows: Array) -> Array:
        coordinates = rows @ self.directions.T
        rest = rows - coordinates @ self.directions
        allowed = self.tolerance * np.sqrt(np.vdot(rows, rows) / len(rows))
        if not (np.linalg.norm(rest, axis=1) > allowed).any():
            return coordinates
        rest -= rest @ self.directions.T @ self.directions
        _, sizes, new = np.linalg.svd(rest, full_matrices=False)
        new = new[sizes > allowed / 4]
        self.directions = np.vstack([self.directions, new])
        if not self.is_exact:
            self.products = np.vstack([self.products, self.product(new)])
            self.num_refreshes += 1
        return np.hstack([coordinates, rest @ new.T])

    @property
    def num_bytes(self) -> int:
        return self.directions.nbytes + self.products.nbytes


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers in forward order, the activations between them, and what comes after the last."""

    weights: tuple[Weight, ...]
    between: tuple[ActivationName, ...]
    objective: Objective
    tolerance: float = TOLERANCE
    max_basis_bytes: int = MAX_BASIS_BYTES


@dataclass(slots=True)
class TunedLayers:
    """Where the tuning of several layers ended, and what it took."""

    deltas: tuple[Delta, ...] = ()
    sizes: tuple[float, ...] = ()
    losses: list[float] = field(default_factory=list)
    early_losses: list[float] = field(default_factory=list)
    best: int = 0
    notes: tuple[str, ...] = ()


def tune_layers(stack: Stack, inputs: Array, targets: NDArray[Any], settings: Settings, *, num_tuned: int) -> TunedLayers:
    """Gradient descent with momentum on all layers, stopped early by the rows behind the first `num_tuned`."""
    layers = [_Layer.first(stack.weights[0], inputs, num_tuned)]
    layers += [_Layer.later(weight, stack) for weight in stack.weights[1:]]
    run = _Run(stack, layers, targets, num_tuned, settings)
    found, best = TunedLayers(), [layer.moved() for layer in layers]
    for iteration in range(settings.num_iterations + 1):
        loss, early = run.forward()
        found.losses.append(loss)
        found.early_losses.append(early)
        if early <= min(found.early_losses):
            best, found.best = [layer.moved() for layer in layers], iteration
        elif run.has_risen(found.losses):
            run.go_back(best)
            continue
        is_over = iteration - found.best >= PATIENCE[settings.method] and num_tuned < len(inputs)
        if is_over or iteration == settings.num_iterations or run.is_full():
            break
        run.step()
    run.go_back(best)
    found.deltas = tuple(layer.delta() for layer in layers)
    found.sizes = tuple(layer.size for layer in layers)
    found.notes = tuple(note for layer in layers for note in layer.notes)
    return found


@dataclass(slots=True)
class _Moved:
    """Where a layer is, and where it is going: c and U, and the momentum of both."""

    scale: float
    factors: Array
    scale_velocity: float
    velocity: Array


@dataclass(slots=True)
class _Layer:
    """One layer of a stack; the first has fixed inputs and neither basis."""

    weight: Weight
    directions: Array
    state: _Moved
    fixed: tuple[Array, Array] | None = None
    """The first layer's Z_0 (n, m_out) and X D^T (n, r)."""
    seen: RowBasis | None = None
    back: RowBasis | None = None
    coordinates: Array = field(default_factory=lambda: np.empty((0, 0)))
    base: Array = field(default_factory=lambda: np.empty((0, 0)))
    max_basis_bytes: int = MAX_BASIS_BYTES
    notes: list[str] = field(default_factory=list)
    square: float = 0.0
    checksum: int = 0

    @classmethod
    def first(cls, weight: Weight, inputs: Array, num_tuned: int) -> _Layer:
        extended = weight.extended(inputs)
        directions = extended[:num_tuned]
        fixed = weight.forward(extended), extended @ directions.T
        zeros = np.zeros((num_tuned, weight.num_outputs))
        layer = cls(weight, directions, _Moved(1.0, zeros, 0.0, zeros.copy()), fixed)
        layer.square, layer.checksum = weight.square, weight.checksum
        return layer

    @classmethod
    def later(cls, weight: Weight, stack: Stack) -> _Layer:
        width = weight.num_inputs + bool(weight.bias)
        seen = RowBasis.empty(width, weight.num_outputs, weight.forward, stack.tolerance)
        back = RowBasis.empty(weight.num_outputs, width, weight.backward, stack.tolerance)
        zeros = np.zeros((0, weight.num_outputs))
        layer = cls(weight, seen.directions, _Moved(1.0, zeros, 0.0, zeros.copy()), seen=seen, back=back)
        layer.max_basis_bytes = stack.max_basis_bytes
        return layer

    def forward(self, inputs: Array) -> Array:
        """Z (n, m_out)."""
        if self.fixed is not None:
            self.base, self.coordinates = self.fixed
        elif self.seen is not None:
            self.coordinates, self.base = self.seen.multiply(self.weight.extended(inputs))
            self.directions = self.seen.directions
            self._pad()
            self.square, self.checksum = self.weight.square, self.weight.checksum
        return self.state.scale * self.base + self.coordinates @ self.state.factors

    def backward(self, gradient: Array) -> Array:
        """G W (n, m_in), of W as it is before the step."""
        assert self.back is not None  # noqa: S101 - nobody asks the first layer
        through = self.state.scale * self.back.through(gradient) + gradient @ self.state.factors.T @ self.directions
        return through[:, : self.weight.num_inputs]

    def step(self, gradient: Array, rate: float, settings: Settings) -> None:
        """One step of gradient descent with momentum, in coordinates."""
        state, pull = self.state, settings.weight_decay + settings.ridge
        state.velocity *= settings.momentum
        state.velocity += self.by_factors(gradient) + pull * state.factors
        state.scale_velocity *= settings.momentum
        state.scale_velocity += settings.weight_decay * state.scale + settings.ridge * (state.scale - 1)
        state.factors -= rate * state.velocity
        state.scale -= rate * state.scale_velocity

    def by_factors(self, gradient: Array) -> Array:
        """The gradient by U (r, m_out) from that by Z (n, m_out)."""
        return gradient if self.fixed is not None else self.coordinates[: len(gradient)].T @ gradient

    def square_of(self, gradient: Array) -> float:
        """The squared norm of the gradient by W."""
        factors = self.by_factors(gradient)
        inner = factors if self.fixed is None else self.coordinates[: len(gradient)] @ factors
        return float(np.vdot(factors, inner))

    def moved(self) -> _Moved:
        state = self.state
        return _Moved(state.scale, state.factors.copy(), state.scale_velocity, state.velocity.copy())

    def _pad(self) -> None:
        missing = len(self.directions) - len(self.state.factors)
        if missing:
            zeros = np.zeros((missing, self.weight.num_outputs))
            self.state.factors = np.vstack([self.state.factors, zeros])
            self.state.velocity = np.vstack([self.state.velocity, zeros])

    def go_back(self, to: _Moved) -> None:
        """To where it was, at rest."""
        self.state = _Moved(to.scale, to.factors.copy(), 0.0, np.zeros_like(to.factors))
        self._pad()

    def see_whether_it_pays(self, iteration: int) -> None:
        """Fall back to exact products where the bases cost as much as W_0 does, or have become too large to hold.

        Until then at most as many products with W_0 were paid as exact ones would have been, and half as much besides.
        """
        if self.seen is None or self.back is None or self.seen.is_exact:
            return
        num_directions = len(self.seen.directions) + len(self.back.directions)
        is_dear = num_directions * (self.seen.width + self.back.width) >= 2 * self.seen.width * self.back.width
        if is_dear or max(self.seen.num_bytes, self.back.num_bytes) > self.max_basis_bytes:
            self.seen.give_up_products()
            self.back.give_up_products()
            self.back.directions = self.back.directions[:0].copy()
            why = "its inputs change too much for the cache to save time" if is_dear else "its basis is full"
            self.notes.append(f"{self.weight.name}: exact products with W_0 from iteration {iteration} on: {why}")

    def is_full(self, iteration: int) -> bool:
        """Whether its change, in directions, takes more memory than it may."""
        is_exact = self.seen is not None and self.seen.is_exact
        if not is_exact or self.directions.nbytes + self.state.factors.nbytes <= self.max_basis_bytes:
            return False
        self.notes.append(
            f"{self.weight.name}: stopped at iteration {iteration}: its change has {len(self.directions)} directions:"
            " ordinary training is cheaper here"
        )
        return True

    def delta(self) -> Delta:
        return Delta(
            self.weight.name,
            self.weight.bias_name,
            self.state.scale,
            self.state.factors,
            self.directions,
            self.checksum,
        )

    @property
    def size(self) -> float:
        """||W - W_0|| / ||W_0||, without the part of the scale that the basis does not see."""
        inner = self.directions @ self.directions.T @ self.state.factors
        own = float(np.vdot(self.state.factors, inner)) + (self.state.scale - 1) ** 2 * self.square
        return float(np.sqrt(max(own, 0.0) / self.square)) if self.square else np.inf


@dataclass(slots=True)
class _Run:
    """A tuning under way: forward and one step at a time."""

    stack: Stack
    layers: list[_Layer]
    targets: NDArray[Any]
    num_tuned: int
    settings: Settings
    rate: float = 0.0
    iteration: int = 0
    pres: list[Array] = field(default_factory=list)

    def forward(self) -> tuple[float, float]:
        """The losses of the rows tuned on and of those that stop it early."""
        hidden = np.empty((0, 0))
        self.pres = []
        for layer, name in zip(self.layers, (*self.stack.between, None), strict=True):
            self.pres.append(layer.forward(hidden))
            if name is not None:
                hidden = activate(name, self.pres[-1])
        losses = self.stack.objective.row_losses(self.pres[-1], self.targets)
        tuned, early = losses[: self.num_tuned], losses[self.num_tuned :]
        return float(tuned.mean()), float((early if len(early) else tuned).mean())

    def step(self) -> None:
        """All gradients by the weights as they are, then all steps."""
        tuned = slice(self.num_tuned)
        loss, gradient = self.stack.objective.value_and_gradient(self.pres[-1][tuned], self.targets[tuned])
        gradients = [gradient]
        for number in range(len(self.layers) - 1, 0, -1):
            through = self.layers[number].backward(gradients[0])
            slope = slope_of(self.stack.between[number - 1], self.pres[number - 1][tuned])
            gradients.insert(0, through if slope is None else through * slope)
        rate = self._rate(loss, gradients)
        self.iteration += 1
        for layer, one in zip(self.layers, gradients, strict=True):
            layer.step(one, rate, self.settings)
            layer.see_whether_it_pays(self.iteration)

    def _rate(self, loss: float, gradients: list[Array]) -> float:
        if self.settings.rate is not None:
            return self.settings.rate
        if not self.rate:
            square = sum(layer.square_of(one) for layer, one in zip(self.layers, gradients, strict=True))
            self.rate = FIRST_RATE * (1 - self.settings.momentum) * loss / square if square else 1.0
        return self.rate

    def has_risen(self, losses: list[float]) -> bool:
        """Whether a rate that was found here turned out too large."""
        return self.settings.rate is None and not losses[-1] <= RISEN * min(losses)

    def is_full(self) -> bool:
        """Whether a layer cannot hold what it has come to."""
        return any(layer.is_full(self.iteration) for layer in self.layers)

    def go_back(self, best: list[_Moved]) -> None:
        self.rate *= SLOWER
        for layer, to in zip(self.layers, best, strict=True):
            layer.go_back(to)
