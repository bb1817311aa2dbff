"""Several layers at once: they do what dense training does, and the passes over the weights are counted."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.layers import Descent, Layer
from farcast_cli.tune.objective import Objective
from farcast_cli.tune.one_layer import Settings
from farcast_cli.tune.weight import Weight, find_weight

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import CallCli

    Array = NDArray[np.float64]

SIZES = (12, 40, 36, 5)
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


def rows() -> tuple[Array, Array]:
    random = np.random.default_rng(2)
    return random.normal(size=(NUM_ROWS, SIZES[0])), random.normal(size=(NUM_ROWS, SIZES[-1]))


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


def descent_in(folder: Path, activation: Any, settings: Settings) -> Descent:
    first, *later = weights_of(folder)
    inputs, targets = rows()
    layers = [Layer.at_start(first, inputs, NUM_ROWS), *(Layer.at_start(one, None, 0) for one in later)]
    return Descent(layers, (activation, activation), Objective("mse"), targets, settings, NUM_ROWS)


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_several_layers_are_dense_sgd(tmp_path: Path, activation: str, weight_decay: float) -> None:
    model = make_model(tmp_path, activation)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, weight_decay=weight_decay)
    descent = descent_in(tmp_path, activation, settings)
    found = [float(losses.mean()) for losses in descent.walk()]
    expected = densely(model, settings)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * expected[0])
    assert found[-1] < 0.7 * found[0]
    assert [layer.weight.num_passes for layer in descent.layers] == [1, *[2 * ITERATIONS + 2] * 2]


def test_a_rate_that_is_found_brings_the_loss_of_several_layers_down(tmp_path: Path) -> None:
    make_model(tmp_path, "relu")
    found = [float(losses.mean()) for losses in descent_in(tmp_path, "relu", Settings("gradient-descent", 300)).walk()]
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


def test_gauss_newton_and_anchors_take_one_layer(tmp_path: Path, call_cli: CallCli) -> None:
    make_model(tmp_path, "relu")
    np.savez(tmp_path / "rows.npz", x=rows()[0], y=rows()[1])
    call = ["tune", "step_1.safetensors", "--layer", "0.weight", "--layer", "2.weight", "--data", "rows.npz", "--loss", "mse"]
    done = call_cli(*call, "-o", "t.safetensors", cwd=tmp_path)
    assert "--activation for several layers" in done.errors[0]
    call += ["--activation", "relu"]
    for more, words in (
        (("--method", "gauss-newton"), "tunes one layer"),
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
