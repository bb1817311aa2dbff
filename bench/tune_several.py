"""Several layers at once: passes over the second one's weights and time per iteration, against dense training.

    python bench/tune_several.py [WIDTH]

Two layers (256 - m - m), a head of one output, squared loss, gradient descent at rates that bring the loss down by a
thousand and more. Dense: torch's SGD in float32; its losses in float64 are the truth. One thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.layers import Layer, Stack
from farcast_cli.tune.objective import Objective, activate
from farcast_cli.tune.one_layer import Settings
from farcast_cli.tune.weight import find_weight

if TYPE_CHECKING:
    from farcast_cli.choices import ActivationName

NUM_ROWS, NUM_INPUTS, ITERATIONS = 16, 256, 60
CASES: tuple[tuple[ActivationName, float, float], ...] = (
    ("gelu", 4.0, 0.0),
    ("gelu", 0.6, 0.9),
    ("relu", 4.0, 0.0),
    ("relu", 0.6, 0.9),
)
"""Activation, rate times m, momentum."""


def several_layers(width: int) -> list[dict[str, Any]]:
    """For each case the passes, milliseconds per iteration, and the largest error of the loss on the way."""
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    rows = random.normal(size=(NUM_ROWS, NUM_INPUTS)), random.normal(size=(NUM_ROWS, 1))
    shapes = {"0": (width, NUM_INPUTS), "1": (width, width), "head": (1, width)}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "step_1.safetensors"
        made = {name: random.normal(size=shape) * np.sqrt((1 + (name != "head")) / shape[1]) for name, shape in shapes.items()}
        save_file({name: torch.from_numpy(values).float() for name, values in made.items()}, path)
        for name, rate, momentum in CASES:
            settings = Settings("gradient-descent", ITERATIONS, rate=rate / width, momentum=momentum)
            about = {"m": width, "activation": name, "momentum": momentum}
            found.append(about | compared(path, name, rows, settings))
            print(found[-1], flush=True)
    return found


def compared(path: Path, name: ActivationName, rows: Any, settings: Settings) -> dict[str, Any]:
    """The same training by tune and by torch."""
    weights = tuple(find_weight(open_snapshot(path), layer) for layer in ("0", "1"))
    objective = Objective("mse", name, load_file(path)["head"].double().numpy())
    started = time.process_time()
    layers = [Layer.at_start(weights[0], rows[0], NUM_ROWS), Layer.at_start(weights[1], None, 0)]
    stack = Stack(layers, (name,), objective, rows[1], NUM_ROWS)
    losses = [float(one.mean()) for one in stack.walk(settings)]
    between = time.process_time()
    dense_losses(load_file(path), name, rows, settings, torch.float32)
    ended = time.process_time()
    exact = dense_losses(load_file(path), name, rows, settings, torch.float64)
    return {
        "passes": weights[1].num_passes,
        "ms": 1000 * (between - started) / ITERATIONS,
        "dense ms": 1000 * (ended - between) / ITERATIONS,
        "error": float(np.abs(np.array(losses) - exact).max() / exact[0]),
        "loss left": exact[-1] / exact[0],
    }


def dense_losses(made: Any, activation: str, rows: Any, settings: Settings, dtype: Any) -> list[float]:
    """The loss before each step of torch's SGD on both layers."""
    layers = [made[name].to(dtype).requires_grad_() for name in ("0", "1")]
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation]
    optimizer = torch.optim.SGD(layers, settings.rate or 0.0, settings.inertia)
    x, y = (torch.from_numpy(one).to(dtype) for one in rows)
    head = made["head"].to(dtype)
    losses = []
    for _ in range(settings.num_iterations + 1):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(act(act(x @ layers[0].T) @ layers[1].T) @ head.T, y)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


# --- Gauss-Newton ----------------------------------------------------------------------------------------------------


def against_descent(width: int = 1024, num_rows: int = 80) -> None:
    """The loss left by Gauss-Newton after each pass, and by the best of 10 settings of gradient descent after 120."""
    for name in ("gelu", "relu"):
        for clusters in (num_rows, 8):
            random = np.random.default_rng(0)
            made = {
                "0": random.normal(size=(width, NUM_INPUTS)) * np.sqrt(2 / NUM_INPUTS),
                "1": random.normal(size=(width, width)) * np.sqrt(2 / width),
                "head": random.normal(size=(1, width)) / np.sqrt(width),
            }
            inputs = random.normal(size=(clusters, NUM_INPUTS))[np.arange(num_rows) % clusters]
            if clusters < num_rows:
                inputs = inputs + 0.05 * random.normal(size=inputs.shape)
            moved = made["0"] + 0.3 * random.normal(size=made["0"].shape) * np.sqrt(2 / NUM_INPUTS)
            hidden = activate(name, activate(name, inputs @ moved.T) @ made["1"].T)
            with tempfile.TemporaryDirectory() as work:
                path = Path(work) / "step_1.safetensors"
                save_file({key: torch.from_numpy(values).float() for key, values in made.items()}, path)
                problem = path, name, inputs, hidden @ made["head"].T
                left = dict(passes_and_losses(*problem, Settings()))
                rivals = [
                    passes_and_losses(*problem, Settings("gradient-descent", ITERATIONS, rate=rate, momentum=momentum))[-1][1]
                    for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
                    for momentum in (0.0, 0.9)
                ]
            about = ", ".join(f"{passes}: {loss:.1e}" for passes, loss in left.items())
            print(f"{name}, {clusters} clusters of rows: {about}; gradient descent {np.nanmin(rivals):.1e}", flush=True)


def passes_and_losses(
    path: Path, name: ActivationName, inputs: Any, targets: Any, settings: Settings
) -> list[tuple[int, float]]:
    """The passes over the second layer and the loss there, as a share of the first."""
    weights = tuple(find_weight(open_snapshot(path), layer) for layer in ("0", "1"))
    objective = Objective("mse", name, load_file(path)["head"].double().numpy())
    layers = [Layer.at_start(weights[0], inputs, len(inputs)), Layer.at_start(weights[1], None, 0)]
    with np.errstate(over="ignore", invalid="ignore"):
        walk = Stack(layers, (name,), objective, targets, len(inputs)).walk(settings)
        found = [(weights[1].num_passes, float(losses.mean())) for losses in walk]
    return [(passes, loss / found[0][1]) for passes, loss in found]


if __name__ == "__main__":
    against_descent()
    several_layers(int([*sys.argv, "4096"][1]))
