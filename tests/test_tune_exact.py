"""One layer in coordinates does what dense float64 training of it does, to rounding, whatever the method and activation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import nn

from farcast_cli.tune.layers import (
    FIRST_DAMPING,
    GOOD,
    GROW,
    LEAST_DAMPING,
    LEAST_GAIN,
    MAX_TRIES,
    POOR,
    POWER_ITERATIONS,
    SHRINK,
    Layer,
    Settings,
    Stack,
    largest_curvature,
)
from farcast_cli.tune.metric import Metric
from farcast_cli.tune.objective import Objective, activate, normal_cdf, slope_of
from farcast_cli.tune.ridge import Ridge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ITERATIONS = 200
TOLERANCE = 1e-12  # of the first loss
TO_THE_END: Any = {"inner_iterations": 400, "inner_tolerance": 1e-13}
"""Conjugate gradients that solve the damped system, as the oracle does; by default they stop earlier."""
ACTIVATIONS = ("none", "relu", "gelu", "gelu-tanh", "silu", "tanh")
MODULES = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}
NUM_ROWS, NUM_INPUTS, NUM_OUTPUTS, NUM_CLASSES, NUM_ANCHORS = 7, 11, 6, 4, 3


@dataclass(frozen=True)
class Case:
    """A small layer with its bias as last column, rows, and what comes after the layer."""

    weights: Array
    inputs: Array
    targets: Array
    objective: Objective
    anchors: Array | None = None
    is_dual: bool = True
    weight: float | None = None

    @property
    def directions(self) -> Array:
        """D: the rows, or what anchors leave of them; or a basis of the inputs, or of what anchors leave of that."""
        if self.anchors is None:
            return self.inputs if self.is_dual else np.eye(self.inputs.shape[1])
        metric = self.metric
        return metric.freed(self.inputs) if self.is_dual else metric.freed(np.eye(self.inputs.shape[1]), power=0.5)

    @property
    def metric(self) -> Metric:
        """Of the anchors; with a weight, all but the first are soft."""
        assert self.anchors is not None
        if self.weight is None:
            return Metric.hard(self.anchors)
        return Metric.hard(self.anchors[:1]).with_rows(self.anchors[1:], self.weight)

    @property
    def stack(self) -> Stack:
        layer = Layer.first(self.inputs @ self.weights.T, self.inputs @ self.directions.T, is_dual=self.is_dual)
        return Stack([layer], self.objective, self.targets, np.full(len(self.inputs), 1 / len(self.inputs)))

    def outputs(self, weights: torch.Tensor) -> torch.Tensor:
        """By torch's own modules."""
        out: torch.Tensor = MODULES[self.objective.activation](torch.from_numpy(self.inputs) @ weights.T)
        if self.objective.head is not None and self.objective.head_bias is not None:
            out = out @ torch.from_numpy(self.objective.head).T + torch.from_numpy(self.objective.head_bias)
        return out

    def loss(self, weights: torch.Tensor) -> torch.Tensor:
        out, targets = self.outputs(weights), torch.from_numpy(self.targets)
        if self.objective.loss == "mse":
            return nn.functional.mse_loss(out, targets)
        return nn.functional.cross_entropy(out, targets)

    @property
    def kept(self) -> Array:
        """The projection of a gradient's rows that anchors leave, (m_in, m_in), or what soft ones make of it."""
        if self.anchors is None:
            return np.eye(self.inputs.shape[1])
        width = self.inputs.shape[1]
        if self.weight is None:
            return np.eye(width) - np.linalg.pinv(self.anchors) @ self.anchors
        moment = self.anchors[1:].T @ self.anchors[1:]
        free = linalg.null_space(self.anchors[:1])
        cost = np.eye(width) + self.weight * width / np.trace(moment) * moment
        return np.asarray(free @ np.linalg.inv(free.T @ cost @ free) @ free.T)


def make_case(
    loss: Any, activation: Any, *, with_head: bool, anchored: bool = False, seed: int = 0, num_rows: int = NUM_ROWS
) -> Case:
    random = np.random.default_rng(seed)
    extended = np.hstack([random.normal(size=(num_rows, NUM_INPUTS)), np.ones((num_rows, 1))])
    anchors = np.hstack([random.normal(size=(NUM_ANCHORS, NUM_INPUTS)), np.ones((NUM_ANCHORS, 1))]) if anchored else None
    weights = random.normal(size=(NUM_OUTPUTS, NUM_INPUTS + 1)) / 3
    head = random.normal(size=(NUM_CLASSES, NUM_OUTPUTS)) / math.sqrt(NUM_OUTPUTS) if with_head else None
    head_bias = random.normal(size=NUM_CLASSES) if with_head else None
    objective = Objective(loss, activation, head, head_bias)
    elsewhere = objective.outputs(extended @ (weights + random.normal(size=weights.shape) / 3).T)
    targets: Any = elsewhere + 0.1 * random.normal(size=elsewhere.shape)
    if loss == "cross-entropy":
        targets = targets.argmax(axis=1)
    return Case(weights, extended, targets, objective, anchors)


def dense_descent(case: Case, settings: Settings) -> list[float]:
    """torch.optim.SGD on the whole matrix in float64; ridge and anchors act on its gradient."""
    weights = nn.Parameter(torch.from_numpy(case.weights.copy()))
    start, kept = torch.from_numpy(case.weights), torch.from_numpy(case.kept)
    assert settings.rate is not None
    optimizer = torch.optim.SGD([weights], lr=settings.rate, momentum=settings.inertia, weight_decay=settings.decay)
    losses = []
    for _ in range(settings.num_iterations + 1):
        optimizer.zero_grad()
        loss = case.loss(weights)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        weights.grad = weights.grad @ kept + settings.pull * (weights.detach() - start)
        optimizer.step()
    return losses


def dense_newton(case: Case, settings: Settings) -> list[float]:
    """The same rule on the whole matrix: the Jacobian by autograd, the damped system in all of W-space."""
    shape = case.weights.shape
    kept = np.kron(np.eye(shape[0]), case.kept)
    start = torch.from_numpy(case.weights)
    weights = start.clone()

    def total(at: torch.Tensor) -> float:
        return case.loss(at).item() + settings.pull / 2 * float(((at - start) ** 2).sum())

    def system(at: torch.Tensor) -> tuple[Array, Array]:
        """The Gauss-Newton matrix and the gradient of the loss, where anchors let W move."""
        jacobian = torch.func.jacrev(case.outputs)(at).reshape(-1, at.numel()).numpy()
        out = case.outputs(at).numpy()
        if case.objective.loss == "mse":
            bend = np.eye(out.size) * 2 / out.size
        else:
            likely = np.exp(out) / np.exp(out).sum(axis=1, keepdims=True)
            blocks = [(np.diag(p) - np.outer(p, p)) / len(out) for p in likely]
            bend = np.zeros((out.size, out.size))
            for row, block in enumerate(blocks):
                place = slice(row * len(block), (row + 1) * len(block))
                bend[place, place] = block
        gradient = torch.func.grad(case.loss)(at).numpy().reshape(-1)
        return kept @ (jacobian.T @ bend @ jacobian) @ kept, kept @ gradient

    matrix, gradient = system(weights)
    largest = dense_largest(matrix, gradient) + settings.pull
    damping = FIRST_DAMPING * largest
    losses = []
    for _ in range(settings.num_iterations + 1):
        losses.append(case.loss(weights).item())
        matrix, gradient = system(weights)
        right = -(gradient + settings.pull * (weights - start).numpy().reshape(-1))
        for _ in range(MAX_TRIES):
            step = np.linalg.solve(matrix + (damping + settings.pull) * np.eye(len(matrix)), right)
            trial = weights + torch.from_numpy(step.reshape(shape))
            gained = total(weights) - total(trial)
            bent = step @ matrix @ step + settings.pull * (step @ step)
            share = gained / (right @ step - bent / 2)
            damping = max(damping * (SHRINK if share > GOOD else GROW if share < POOR else 1), LEAST_DAMPING * largest)
            if gained > LEAST_GAIN * losses[0]:
                break
        else:
            return losses
        weights = trial
    return losses


def dense_largest(matrix: Array, vector: Array) -> float:
    largest = 0.0
    for _ in range(POWER_ITERATIONS):
        image = matrix @ vector
        largest = max(largest, float(vector @ image) / float(vector @ vector))
        vector = image / np.linalg.norm(image)
    return largest


def assert_same_path(found: list[float], expected: list[float]) -> None:
    """Equal to the last loss that both have: a path that has come to its end stops when rounding lets it."""
    length = min(len(found), len(expected))
    np.testing.assert_allclose(found[:length], expected[:length], rtol=0, atol=TOLERANCE * expected[0])
    assert abs(found[-1] - expected[-1]) <= TOLERANCE * expected[0]


@dataclass(frozen=True)
class Walked:
    """A path to its end: its losses, and where the layer is then."""

    losses: list[float]
    layer: Layer


def run(case: Case, settings: Settings) -> Walked:
    stack = case.stack
    return Walked([float(losses.mean()) for losses in stack.walk(settings)], stack.layers[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.05},
        {"momentum": 0.5, "ridge": 0.1},
        {"momentum": 0.5, "ridge": 0.1, "weight_decay": 0.05},
    ],
    ids=["plain", "momentum", "decay", "ridge", "both"],
)
def test_gradient_descent_is_dense_sgd(loss: str, activation: str, with_head: bool, options: dict[str, Any]) -> None:  # noqa: FBT001
    case = make_case(loss, activation, with_head=with_head)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, **options)
    found, expected = run(case, settings).losses, dense_descent(case, settings)
    assert len(found) == ITERATIONS + 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * expected[0])
    assert found[-1] < found[0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_gradient_descent_beside_anchors_is_dense_sgd_with_its_gradient_projected(loss: str, activation: str) -> None:
    case = make_case(loss, activation, with_head=True, anchored=True)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, ridge=0.01)
    expected = dense_descent(case, settings)
    np.testing.assert_allclose(run(case, settings).losses, expected, rtol=0, atol=TOLERANCE * expected[0])


@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_gradient_descent_beside_soft_anchors_is_dense_sgd_in_their_metric(loss: str, is_dual: bool) -> None:  # noqa: FBT001
    case = replace(make_case(loss, "tanh", with_head=True, anchored=True), weight=30.0, is_dual=is_dual)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, ridge=0.01)
    expected = dense_descent(case, settings)
    np.testing.assert_allclose(run(case, settings).losses, expected, rtol=0, atol=TOLERANCE * expected[0])
    assert case.anchors is not None
    by_moment = Metric.hard(case.anchors[:1]).with_moment(case.anchors[1:].T @ case.anchors[1:] / 2, 30.0)
    np.testing.assert_allclose(by_moment.freed(case.inputs), case.metric.freed(case.inputs), atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("loss", "ridge"),
    [("mse", 0.0), ("mse", 0.01), ("cross-entropy", 0.001), ("cross-entropy", 0.01)],
    # rows that can be told apart send W to infinity without a ridge, and rounding grows on the way
)
@pytest.mark.parametrize("anchored", [False, True])
def test_gauss_newton_is_dense_gauss_newton(loss: str, activation: str, ridge: float, anchored: bool) -> None:  # noqa: FBT001
    case = make_case(loss, activation, with_head=True, anchored=anchored)
    settings = Settings("gauss-newton", ITERATIONS, ridge=ridge, **TO_THE_END)
    assert_same_path(run(case, settings).losses, dense_newton(case, settings))


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_gauss_newton_without_a_head_is_dense_gauss_newton(loss: str, activation: str) -> None:
    case = make_case(loss, activation, with_head=False)
    settings = Settings("gauss-newton", ITERATIONS, ridge=0.01, **TO_THE_END)
    assert_same_path(run(case, settings).losses, dense_newton(case, settings))


@pytest.mark.parametrize("method", ["gauss-newton", "gradient-descent"])
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_primal_form_is_the_dual_one(method: Any, loss: str, anchored: bool) -> None:  # noqa: FBT001
    case = make_case(loss, "silu", with_head=True, anchored=anchored)
    settings = Settings(method, 60, ridge=0.01, **TO_THE_END)
    dual, primal = run(case, settings), run(replace(case, is_dual=False), settings)
    assert_same_path(primal.losses, dual.losses)
    changes = [
        walked.layer.factors.T @ one.directions for walked, one in ((dual, case), (primal, replace(case, is_dual=False)))
    ]
    np.testing.assert_allclose(changes[1], changes[0], atol=1e-7)


@pytest.mark.parametrize("is_dual", [False, True])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("num_rows", [NUM_ROWS, 40])
def test_the_closed_form_is_the_dense_ridge_regression_and_leaves_each_row_out(
    is_dual: bool,  # noqa: FBT001
    anchored: bool,  # noqa: FBT001
    num_rows: int,
) -> None:
    """By solving for every row left out, with weights of rows."""
    case = make_case("mse", "none", with_head=False, anchored=anchored, num_rows=num_rows)
    case = replace(case, is_dual=is_dual)
    shares = np.random.default_rng(4).uniform(0.5, 2, num_rows)
    shares /= shares.sum()
    layer, mu = case.stack.layers[0], 0.03
    residual = case.targets - layer.base
    free = case.inputs @ case.kept

    def changed(kept: NDArray[np.bool_]) -> NDArray[Any]:
        weighted = free[kept].T * shares[kept]
        return np.linalg.solve(weighted @ free[kept] + mu * np.eye(free.shape[1]), weighted @ residual[kept]).T

    found = Ridge.of(layer.overlap, shares, is_dual=is_dual, num_outputs=NUM_OUTPUTS)
    for part in (slice(0, 2), slice(2, None)):  # as it comes in blocks of outputs
        found.add(residual[:, part])
    everything = np.ones(num_rows, bool)
    fitted = ((residual - free @ changed(everything).T) ** 2).mean(axis=1)
    alone = [float(((residual[row] - changed(np.arange(num_rows) != row) @ free[row]) ** 2).mean()) for row in range(num_rows)]
    np.testing.assert_allclose(found.fitted(mu), fitted, rtol=1e-9)
    np.testing.assert_allclose(found.losses([mu])[0], alone, rtol=1e-9)
    np.testing.assert_allclose(found.factors(mu).T @ case.directions, changed(everything) @ case.kept, atol=1e-10)


@pytest.mark.parametrize("is_dual", [False, True])
def test_the_closed_form_judges_rows_that_are_left_out_together(is_dual: bool) -> None:  # noqa: FBT001
    case = replace(make_case("mse", "none", with_head=False, num_rows=30), is_dual=is_dual)
    layer, mu, tuned, left = case.stack.layers[0], 0.03, slice(0, 20), slice(20, None)
    residual, inputs = case.targets - layer.base, case.inputs
    shares = np.full(20, 1 / 20)
    overlap = layer.overlap[tuned, tuned] if is_dual else layer.overlap[tuned]
    others = layer.overlap[left, tuned] if is_dual else layer.overlap[left]
    found = Ridge.of(overlap, shares, is_dual=is_dual, left_out=others)
    found.add(residual[tuned], residual[left])
    matrix = inputs[tuned].T @ inputs[tuned] / 20 + mu * np.eye(inputs.shape[1])
    change = np.linalg.solve(matrix, inputs[tuned].T @ residual[tuned] / 20).T
    np.testing.assert_allclose(found.losses([mu])[0], ((residual[left] - inputs[left] @ change.T) ** 2).mean(axis=1), rtol=1e-9)


def test_the_weights_are_the_dense_ones_too() -> None:
    case = make_case("cross-entropy", "gelu", with_head=True)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.05, weight_decay=0.01)
    layer = run(case, settings).layer
    made = layer.scale * case.weights + layer.factors.T @ case.inputs
    loss = case.loss(torch.from_numpy(made)).item()
    assert abs(loss - dense_descent(case, settings)[-1]) <= TOLERANCE * dense_descent(case, settings)[0]


def test_anchors_keep_their_pre_activations_to_rounding() -> None:
    case = make_case("mse", "relu", with_head=True, anchored=True)
    assert case.anchors is not None
    change = run(case, Settings()).layer.factors.T @ case.directions
    assert np.linalg.norm(change) > 0.1
    assert np.abs(case.anchors @ change.T).max() < 1e-13


def test_gauss_newton_needs_far_fewer_iterations_than_gradient_descent_where_inputs_are_clustered() -> None:
    case = make_case("mse", "none", with_head=True)
    random = np.random.default_rng(1)
    clustered = random.normal(size=(1, NUM_INPUTS + 1)) + 0.05 * case.inputs
    case = replace(case, inputs=clustered)

    def needed(settings: Settings) -> int:
        losses = run(case, settings).losses
        return next((i for i, loss in enumerate(losses) if loss <= 1e-6 * losses[0]), ITERATIONS + 1)

    assert needed(Settings("gauss-newton", ITERATIONS)) <= 20
    assert needed(Settings("gradient-descent", ITERATIONS)) > ITERATIONS


def test_a_rate_found_from_the_curvature_brings_the_loss_down() -> None:
    for activation in ACTIVATIONS:
        case = make_case("cross-entropy", activation, with_head=True)
        losses = run(case, Settings("gradient-descent", ITERATIONS)).losses
        assert losses[-1] < 0.25 * losses[0]


def test_the_largest_curvature_is_the_largest_eigenvalue_of_the_dense_gauss_newton_matrix() -> None:
    case = make_case("mse", "none", with_head=False)
    expected = 2 / case.targets.size * float(np.linalg.eigvalsh(case.inputs @ case.inputs.T)[-1])
    assert largest_curvature(case.stack) == pytest.approx(expected, rel=0.05)


# --- objective -------------------------------------------------------------------------------------------------------


def test_the_normal_distribution_function_is_that_of_the_c_library() -> None:
    values = np.concatenate([np.linspace(-12, 12, 20_001), [0.0, -0.0, 1e-300, 40.0, -40.0]])
    expected = [0.5 * math.erfc(-value / math.sqrt(2)) for value in values]
    np.testing.assert_allclose(normal_cdf(values), expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40))
def test_activations_and_slopes_are_torchs(activation: Any, values: list[float]) -> None:
    pre = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    out = MODULES[activation](pre)
    out.sum().backward()
    assert pre.grad is not None
    found, slope = activate(activation, np.array(values)), slope_of(activation, np.array(values))
    np.testing.assert_allclose(found, out.detach().numpy(), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(np.ones(len(values)) if slope is None else slope, pre.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("with_head", [True, False])
def test_losses_and_gradients_are_torchs(loss: str, activation: str, with_head: bool) -> None:  # noqa: FBT001
    case = make_case(loss, activation, with_head=with_head)
    weights = torch.from_numpy(case.weights).requires_grad_()
    expected = case.loss(weights)
    expected.backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    pre = case.inputs @ case.weights.T
    losses, gradient = case.objective.losses_and_gradient(pre.copy(), case.targets, np.full(NUM_ROWS, 1 / NUM_ROWS))
    assert losses.mean() == pytest.approx(expected.item(), rel=1e-14)
    np.testing.assert_allclose(case.objective.row_losses(pre, case.targets), losses, rtol=1e-14)
    np.testing.assert_allclose(gradient.T @ case.inputs, weights.grad.numpy(), rtol=1e-12, atol=1e-14)
