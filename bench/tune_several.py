"""Several layers at once: the loss left after each pass over the second one's weights, by Gauss-Newton and by gradient descent.

    python bench/tune_several.py [WIDTH]

Two layers (256 - m - m), a head of one output, squared loss. Gradient descent has the best of ten pairs of rate and momentum.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.layers import Layer, Settings, Stack
from farcast_cli.tune.objective import Objective, activate
from farcast_cli.tune.weight import find_weight

if TYPE_CHECKING:
    from farcast_cli.choices import ActivationName

NUM_INPUTS, NUM_ROWS, ITERATIONS = 256, 80, 60


def several_layers(width: int = 1024) -> list[dict[str, Any]]:
    """The loss left by Gauss-Newton after each pass, and by the best of 10 settings of gradient descent after 120."""
    found: list[dict[str, Any]] = []
    names: tuple[ActivationName, ...] = ("gelu", "relu")
    for name in names:
        for clusters in (NUM_ROWS, 8):
            random = np.random.default_rng(0)
            made = {
                "0": random.normal(size=(width, NUM_INPUTS)) * np.sqrt(2 / NUM_INPUTS),
                "1": random.normal(size=(width, width)) * np.sqrt(2 / width),
                "head": random.normal(size=(1, width)) / np.sqrt(width),
            }
            inputs = random.normal(size=(clusters, NUM_INPUTS))[np.arange(NUM_ROWS) % clusters]
            if clusters < NUM_ROWS:
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
            found.append({"activation": name, "clusters": clusters, "by passes": left, "descent": float(np.nanmin(rivals))})
            print(found[-1], flush=True)
    return found


def passes_and_losses(
    path: Path, name: ActivationName, inputs: Any, targets: Any, settings: Settings
) -> list[tuple[int, float]]:
    """The passes over the second layer and the loss there, as a share of the first."""
    weights = tuple(find_weight(open_snapshot(path), layer) for layer in ("0", "1"))
    objective = Objective("mse", name, load_file(path)["head"].double().numpy())
    layers = [Layer.first(weights[0].forward(inputs), inputs @ inputs.T), Layer.moving(weights[1])]
    shares = np.full(len(inputs), 1 / len(inputs))
    with np.errstate(over="ignore", invalid="ignore"):
        walk = Stack(layers, objective, targets, shares, (name,)).walk(settings)
        found = [(weights[1].num_passes, float(losses.mean())) for losses in walk]
    return [(passes, loss / found[0][1]) for passes, loss in found]


if __name__ == "__main__":
    several_layers(int([*sys.argv, "1024"][1]))
