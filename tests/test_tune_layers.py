"""Several layers at once: they do what dense training does, and the passes over the weights are counted."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import functional as differentiate

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.layers import LEAST_GAIN, MAX_TRIES, Damping, Layer, Settings, Stack
from farcast_cli.tune.objective import Objective
from farcast_cli.tune.weight import Weight, find_weight
from tests.test_tune_exact import dense_largest

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import CallCli

    Array = NDArray[np.float64]

SIZES = (12, 40, 36, 5)
SMALL = (5, 8, 7, 3)
NUM_ROWS, ITERATIONS = 9, 60


def make_model(folder: Path, activation: str, sizes: tuple[int, ...] = SIZES) -> nn.Sequential:
    torch.manual_seed(0)
    act = {"relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[activation]
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(layers[0], act(), layers[1], act(), layers[2]).double()
    save_file(model.state_dict(), folder / "step_1.safetensors")
    return model


def weights_of(folder: Path) -> tuple[Weight, ...]:
    snapshot = open_snapshot(folder / "step_1.safetensors")
    return tuple(find_weight(snapshot, f"{place}.weight", f"{place}.bias") for place in (0, 2, 4))


def rows(sizes: tuple[int, ...] = SIZES) -> tuple[Array, Array]:
    random = np.random.default_rng(2)
    return random.normal(size=(NUM_ROWS, sizes[0])), random.normal(size=(NUM_ROWS, sizes[-1]))


def densely(model: nn.Sequential, settings: Settings) -> list[float]:
    inputs, targets = map(torch.from_numpy, rows())
    assert settings.rate is not None
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, settings.inertia, weight_decay=settings.decay)
    losses = []
    for _ in range(settings.num_iterations + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def stack_in(folder: Path, activation: Any, loss: Any = "mse", sizes: tuple[int, ...] = SIZES) -> Stack:
    first, *later = weights_of(folder)
    inputs, targets = rows(sizes)
    targets = targets if loss == "mse" else targets.argmax(axis=1)
    extended = first.extended(inputs)
    layers = [Layer.first(first.forward(extended), extended @ extended.T), *(Layer.moving(one) for one in later)]
    return Stack(layers, Objective(loss), targets, np.full(NUM_ROWS, 1 / NUM_ROWS), (activation, activation))


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_several_layers_are_dense_sgd(tmp_path: Path, activation: str, weight_decay: float) -> None:
    model = make_model(tmp_path, activation)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, weight_decay=weight_decay)
    stack = stack_in(tmp_path, activation)
    later = [layer.later for layer in stack.layers[1:]]
    found = [float(losses.mean()) for losses in stack.walk(settings)]
    expected = densely(model, settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])
    assert found[-1] < 0.7 * found[0]
    assert [weight.num_passes for weight in later if weight] == [2 * ITERATIONS + 1] * 2


def densely_by_newton(model: nn.Sequential, loss: str, settings: Settings) -> list[float]:
    """Levenberg and Marquardt's rule on all parameters as one vector: the Jacobian by autograd, a dense system."""
    inputs, targets = map(torch.from_numpy, rows(SMALL))
    targets = targets if loss == "mse" else targets.argmax(dim=1)
    sizes = [one.numel() for one in model.parameters()]
    start = nn.utils.parameters_to_vector(model.parameters()).detach()

    def outputs(vector: torch.Tensor) -> torch.Tensor:
        out, parts = inputs, iter(torch.split(vector, sizes))
        for module in model:
            is_linear = isinstance(module, nn.Linear)
            out = nn.functional.linear(out, next(parts).view(-1, out.shape[1]), next(parts)) if is_linear else module(out)
        return out

    def loss_of(out: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(out, targets) if loss == "mse" else nn.functional.cross_entropy(out, targets)

    def total_of(vector: torch.Tensor) -> float:
        return float(loss_of(outputs(vector)) + settings.pull / 2 * (vector - start).square().sum())

    place, damping = start, None
    losses: list[float] = []
    while len(losses) <= settings.num_iterations:
        out = outputs(place)
        losses.append(float(loss_of(out)))
        jacobian = differentiate.jacobian(outputs, place).flatten(0, 1)  # type: ignore[no-untyped-call]
        curvature = differentiate.hessian(loss_of, out).reshape(out.numel(), -1)  # type: ignore[no-untyped-call]
        matrix = jacobian.T @ curvature @ jacobian
        by_out = differentiate.jacobian(loss_of, out).flatten()  # type: ignore[no-untyped-call]
        gradient = jacobian.T @ by_out + settings.pull * (place - start)
        damping = damping or Damping.begin(dense_largest(matrix.numpy(), gradient.numpy()) + settings.pull)
        for _ in range(MAX_TRIES):
            step = -torch.linalg.solve(matrix + (damping.value + settings.pull) * torch.eye(len(place)).double(), gradient)
            promised = float(damping.value * step @ step - gradient @ step) / 2
            gain = total_of(place) - total_of(place + step)
            damping.learn(gain / promised)
            if gain > LEAST_GAIN * losses[0]:
                break
        place = place + step
    return losses


@pytest.mark.parametrize(
    ("loss", "activation", "ridge"), [("mse", "tanh", 0.0), ("mse", "silu", 0.02), ("cross-entropy", "silu", 0.02)]
)
def test_gauss_newton_of_several_layers_is_dense_levenberg_marquardt(
    tmp_path: Path, loss: str, activation: str, ridge: float
) -> None:
    model = make_model(tmp_path, activation, SMALL)
    settings = Settings(iterations=10, ridge=ridge, inner_iterations=400, inner_tolerance=1e-13)
    stack = stack_in(tmp_path, activation, loss, SMALL)
    expected = densely_by_newton(model, loss, settings)
    found = [float(losses.mean()) for losses in stack.walk(settings)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])
    assert found[-1] < 0.5 * found[0]
    assert (
        max(layer.later.num_passes for layer in stack.layers if layer.later) <= 2 * 10 + 1 + 2
    )  # two steps at most were tried in vain


def test_a_rate_that_is_found_brings_the_loss_of_several_layers_down(tmp_path: Path) -> None:
    make_model(tmp_path, "relu")
    found = [float(losses.mean()) for losses in stack_in(tmp_path, "relu").walk(Settings("gradient-descent", 300))]
    assert found[-1] < 0.05 * found[0]


def test_the_command_tunes_several_layers_and_says_how_many_passes_it_took(tmp_path: Path, call_cli: CallCli) -> None:
    model = make_model(tmp_path, "relu").float()
    save_file(model.state_dict(), tmp_path / "step_1.safetensors")
    inputs = np.random.default_rng(0).normal(size=(144, SIZES[0])).astype(np.float32)
    with torch.no_grad():
        targets = model(torch.from_numpy(inputs)).numpy() + inputs[:, :5]
    np.savez(tmp_path / "rows.npz", x=inputs, y=targets)
    call = ["tune", "step_1.safetensors", "--data", "rows.npz", "--loss", "mse", "-o", "tuned.safetensors"]
    call += [word for place in (0, 2) for word in ("--layer", f"{place}.weight", "--bias", f"{place}.bias")]
    call += ["--subsample", "72", "--iterations", "40"]
    call += ["--activation", "relu", "--head", "4.weight", "--head-bias", "4.bias", "--method", "gradient-descent"]
    done = call_cli(*call, cwd=tmp_path)
    assert done.returncode == 0, done
    assert "passes over the weights" in done.stderr
    before, after = model.state_dict(), load_file(tmp_path / "tuned.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        *("0.weight", "0.bias", "2.weight", "2.bias")
    }


def test_gauss_newton_tunes_several_layers_by_default_and_says_what_memory_it_takes(tmp_path: Path, call_cli: CallCli) -> None:
    model = make_model(tmp_path, "tanh", (12, 40, 36, 32)).float()
    save_file(model.state_dict(), tmp_path / "step_1.safetensors")
    inputs = np.random.default_rng(0).normal(size=(129, 12)).astype(np.float32)
    with torch.no_grad():
        targets = model(torch.from_numpy(inputs)).numpy() + np.tanh(inputs[:, :1])
    np.savez(tmp_path / "rows.npz", x=inputs, y=targets)
    call = [
        "tune",
        "step_1.safetensors",
        "--data",
        "rows.npz",
        "--loss",
        "mse",
        "-o",
        "tuned.safetensors",
        "--activation",
        "tanh",
    ]
    call += [word for place in (0, 2) for word in ("--layer", f"{place}.weight", "--bias", f"{place}.bias")]
    call += ["--head", "4.weight", "--head-bias", "4.bias", "--iterations", "2", "--json"]
    done = call_cli(*call, "--gate", "0", cwd=tmp_path)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["method"] == "gauss-newton"
    before, after = model.state_dict(), load_file(tmp_path / "tuned.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        *("0.weight", "0.bias", "2.weight", "2.bias")
    }
    np.savez(tmp_path / "rows.npz", x=np.tile(inputs, (400, 1)), y=np.tile(targets, (400, 1)))
    done = call_cli(*call, "--overwrite", cwd=tmp_path)
    assert (done.returncode, len(done.errors)) == (2, 1)
    assert "expected at most 2 GiB" in done.errors[0]
    assert "--method gradient-descent takes some" in done.hints[0]


def test_anchors_take_one_layer(tmp_path: Path, call_cli: CallCli) -> None:
    make_model(tmp_path, "relu")
    np.savez(tmp_path / "rows.npz", x=rows()[0], y=rows()[1])
    call = ["tune", "step_1.safetensors", "--layer", "0.weight", "--layer", "2.weight", "--data", "rows.npz", "--loss", "mse"]
    done = call_cli(*call, "-o", "t.safetensors", cwd=tmp_path)
    assert "--activation for several layers" in done.errors[0]
    call += ["--activation", "relu"]
    for more, words in (
        (("--anchor", "rows.npz"), "one layer"),
        (("--layer", "0.weight"), "given twice"),
    ):
        done = call_cli(*call, *more, "-o", "t.safetensors", cwd=tmp_path)
        assert (done.returncode, len(done.errors)) == (2, 1)
        assert words in done.errors[0]
    swapped = [{"0.weight": "2.weight", "2.weight": "0.weight"}.get(word, word) for word in call]
    done = call_cli(*swapped, "-o", "t.safetensors", cwd=tmp_path)
    assert "expected 36 inputs" in done.errors[0]
    assert "forward order" in done.hints[0]
