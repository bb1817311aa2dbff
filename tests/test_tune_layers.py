"""Several layers at once: the cached products come to what dense training does, are counted, and give way where they do not pay."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.layers import MAX_BASIS_BYTES, TOLERANCE, RowBasis, Stack, TunedLayers, tune_layers
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
    act = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}[activation]
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


def lazily(
    folder: Path, activation: Any, tolerance: float, settings: Settings, max_bytes: int = MAX_BASIS_BYTES
) -> tuple[TunedLayers, tuple[Weight, ...]]:
    weights = weights_of(folder)
    inputs, targets = rows()
    stack = Stack(weights, (activation, activation), Objective("mse"), tolerance, max_bytes)
    return tune_layers(stack, inputs, targets, settings, num_tuned=NUM_ROWS), weights


def densely(model: nn.Sequential, settings: Settings) -> list[float]:
    inputs, targets = map(torch.from_numpy, rows())
    assert settings.rate is not None
    optimizer = torch.optim.SGD(model.parameters(), settings.rate, settings.momentum, weight_decay=settings.weight_decay)
    losses = []
    for _ in range(settings.num_iterations + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_without_a_tolerance_several_layers_are_dense_sgd(tmp_path: Path, activation: str, weight_decay: float) -> None:
    """To 1e-10 of the first loss: what is left of a residual below the tolerance is dropped."""
    model = make_model(tmp_path, activation)
    settings = Settings("gradient-descent", ITERATIONS, rate=0.02, weight_decay=weight_decay)
    found, _ = lazily(tmp_path, activation, 1e-13, settings)
    expected = densely(model, settings)
    np.testing.assert_allclose(found.losses, expected, rtol=0, atol=1e-10 * expected[0])


@pytest.mark.parametrize(("activation", "most"), [("gelu", 30), ("relu", 100)])
def test_with_a_tolerance_the_loss_is_near_the_dense_one_at_a_few_passes(tmp_path: Path, activation: str, most: int) -> None:
    model = make_model(tmp_path, activation, (12, 500, 480, 5))
    settings = Settings("gradient-descent", ITERATIONS, rate=0.005)
    found, weights = lazily(tmp_path, activation, TOLERANCE, settings)
    expected = densely(model, settings)
    assert np.abs(np.array(found.losses) - expected).max() < 0.05 * expected[0]
    assert found.losses[-1] == pytest.approx(expected[-1], rel=0.01)
    assert expected[-1] < 0.3 * expected[0]
    assert weights[0].num_passes == 1
    assert weights[1].num_passes < most  # exact products take 120


def test_a_layer_whose_inputs_move_too_far_falls_back_to_exact_products_and_says_so(tmp_path: Path) -> None:
    model = make_model(tmp_path, "tanh", (12, 300, 280, 5))
    settings = Settings("gradient-descent", 40, rate=0.05, momentum=0.5)
    found, weights = lazily(tmp_path, "tanh", 1e-6, settings)
    assert any("1.weight" not in note and "exact products with W_0 from iteration" in note for note in found.notes)
    expected = densely(model, settings)
    assert np.abs(np.array(found.losses) - expected).max() < 1e-3 * expected[0]
    assert weights[1].num_passes > 40


def test_a_change_of_more_directions_than_memory_is_given_for_ends_the_tuning_with_the_best_so_far(tmp_path: Path) -> None:
    make_model(tmp_path, "tanh", (12, 300, 280, 5))
    settings = Settings("gradient-descent", 40, rate=0.05, momentum=0.5)
    found, _ = lazily(tmp_path, "tanh", 1e-9, settings, max_bytes := 100 * 8 * 600)
    assert any("stopped at iteration" in note and "directions" in note for note in found.notes)
    assert len(found.losses) < 40
    assert found.losses[found.best] == min(found.losses) < found.losses[0]
    two_more = 2 * NUM_ROWS * 8 * 600  # iterations: one falls back to exact products, one ends
    assert all(d.directions.nbytes + d.factors.nbytes < max_bytes + two_more for d in found.deltas[1:])


def test_a_basis_reads_the_weights_only_for_what_it_has_not_seen() -> None:
    random = np.random.default_rng(0)
    matrix, seen = random.normal(size=(20, 30)), random.normal(size=(4, 30))
    basis = RowBasis.empty(30, 20, lambda rows: rows @ matrix.T, 1e-10)
    for rows_ in (seen, random.normal(size=(6, 4)) @ seen, seen[::-1]):
        coordinates, product = basis.multiply(rows_)
        np.testing.assert_allclose(product, rows_ @ matrix.T, atol=1e-9)
        np.testing.assert_allclose(coordinates @ basis.directions, rows_, atol=1e-9)
    assert basis.num_refreshes == 1
    basis.multiply(random.normal(size=(1, 30)))
    assert basis.num_refreshes == 2
    np.testing.assert_allclose(basis.directions @ basis.directions.T, np.eye(5), atol=1e-12)


def test_the_command_tunes_several_layers_and_says_how_many_passes_it_took(tmp_path: Path, call_cli: CallCli) -> None:
    model = make_model(tmp_path, "relu").float()
    save_file(model.state_dict(), tmp_path / "step_1.safetensors")
    inputs = np.random.default_rng(0).normal(size=(144, SIZES[0])).astype(np.float32)
    with torch.no_grad():
        targets = model(torch.from_numpy(inputs)).numpy() + inputs[:, :5]
    np.savez(tmp_path / "rows.npz", x=inputs, y=targets)
    call = ["tune", "step_1.safetensors", "--data", "rows.npz", "--loss", "mse", "-o", "tuned.safetensors"]
    call += [word for place in (0, 2) for word in ("--layer", f"{place}.weight", "--bias", f"{place}.bias")]
    call += ["--subsample", "72", "--holdout", ".45"]
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
