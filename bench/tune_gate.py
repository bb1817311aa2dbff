"""The gate's record: tunings that help, that help a little, and that cannot help, with and without the gate.

    python bench/tune_gate.py [SEEDS]

Rows are drawn from a model that is the checkpoint's own with its layer changed by some size, and noise. At size 0 the
checkpoint is what the rows were drawn from: no change of it is better on rows to come, and whatever is written is harm.
The choice alone writes where any place of the path but the start was best for rows left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from farcast_cli.run.trajectory import open_snapshot
from farcast_cli.tune.data import folds_of, read_data
from farcast_cli.tune.gate import judge
from farcast_cli.tune.layers import Settings
from farcast_cli.tune.objective import Objective
from farcast_cli.tune.solve import Model, solve
from farcast_cli.tune.weight import find_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName, LossName, SolverName

    Array = NDArray[np.float64]

NUM_INPUTS, WIDTH, NUM_ROWS, NUM_FRESH, NUM_SEEDS = 24, 128, 128, 4000, 25
NOISE = 0.5  # of the standard deviation of what is behind it
SIZES = {"cannot help": 0.0, "help a little": 0.25, "help": 1.0}  # of the layer's change, as a share of the layer
GATES = (0.0, 1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Kind:
    """A way to tune."""

    loss: LossName
    activation: ActivationName
    num_outputs: int
    """Of the head; 0: the layer alone."""
    method: SolverName


KINDS = {
    "layer alone, closed form": Kind("mse", "none", 0, "gauss-newton"),
    "head, Gauss-Newton": Kind("mse", "relu", 4, "gauss-newton"),
    "head, gradient descent": Kind("mse", "relu", 4, "gradient-descent"),
    "labels, Gauss-Newton": Kind("cross-entropy", "relu", 8, "gauss-newton"),
}


@dataclass(frozen=True)
class Case:
    """Inputs and targets to tune on, and fresh ones to see what came of it."""

    model: Model
    path: Path
    inputs: Array
    targets: NDArray[Any]


def make(kind: Kind, size: float, seed: int, folder: Path) -> Case:
    """A checkpoint on disk, its rows on disk, and fresh rows."""
    random = np.random.default_rng(seed)
    layer = random.normal(size=(WIDTH, NUM_INPUTS)) / np.sqrt(NUM_INPUTS)
    change = random.normal(size=layer.shape) / np.sqrt(NUM_INPUTS)
    head = random.normal(size=(kind.num_outputs, WIDTH)) * (3 / np.sqrt(WIDTH)) if kind.num_outputs else None
    path = folder / f"step_{seed}.safetensors"
    save_file({"w": torch.from_numpy(layer)}, path)
    objective = Objective(kind.loss, kind.activation, head)
    inputs = random.normal(size=(NUM_ROWS + NUM_FRESH, NUM_INPUTS))
    targets = drawn(objective.outputs(inputs @ (layer + size * change).T), kind, random)
    rows = folder / f"rows_{seed}.npz"
    np.savez(rows, x=inputs[:NUM_ROWS], y=targets[:NUM_ROWS])
    model = Model((find_weight(open_snapshot(path), "w"),), (), objective)
    return Case(model, rows, inputs[NUM_ROWS:], targets[NUM_ROWS:])


def drawn(outputs: Array, kind: Kind, random: Any) -> NDArray[Any]:
    """Targets with noise around the outputs, or labels as likely as the outputs say."""
    if kind.loss == "mse":
        return np.asarray(outputs + NOISE * outputs.std() * random.normal(size=outputs.shape))
    return np.asarray((outputs + random.gumbel(size=outputs.shape)).argmax(axis=1))


def one(kind: Kind, size: float, seed: int, folder: Path) -> dict[str, Any]:
    """What the choice alone would do, what the gate says, and whether what would be written is better on fresh rows."""
    case = make(kind, size, seed, folder)
    data = read_data(case.path, kind.loss)
    settings = Settings(kind.method)
    folds = folds_of(data, seed=seed, one_by_one=case.model.has_closed_form(settings))
    found = solve(case.model, data, folds, settings)
    verdict = judge(found.before, found.left_out, data.groups, threshold=0)
    losses = [
        case.model.objective.row_losses(case.model.pre(case.inputs, deltas), case.targets).mean()
        for deltas in ((), found.deltas)
    ]
    return {
        "written": found.place > 0,
        "z": verdict.z,
        "harm": bool(losses[1] > losses[0]),
        "ratio": float(losses[1] / losses[0]),
    }


def gate_record(num_seeds: int = NUM_SEEDS) -> dict[str, dict[str, dict[str, Any]]]:
    """Counts by what should come of it and by kind: written by the choice alone and by gates, and how many did harm."""
    record: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as work:
        for name, size in SIZES.items():
            record[name] = {}
            for kind_name, kind in KINDS.items():
                runs = [one(kind, size, seed, Path(work)) for seed in range(num_seeds)]
                record[name][kind_name] = counts(runs)
                print(f"{name:<14} {kind_name:<26} {record[name][kind_name]}", flush=True)
            all_kinds = list(record[name].values())
            record[name]["all"] = {key: sum(one[key] for one in all_kinds) for key in all_kinds[0] if key != "worst"}
            record[name]["all"]["worst"] = max(one["worst"] for one in all_kinds)
            print(f"{name:<14} {'all':<26} {record[name]['all']}", flush=True)
    return record


def counts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many were written and did harm, by who decides; `worst` is the largest ratio of losses that was written."""
    written = [run for run in runs if run["written"]]
    found: dict[str, Any] = {
        "tunings": len(runs),
        "the choice writes": len(written),
        "of these harm": sum(run["harm"] for run in written),
        "worst": max((run["ratio"] for run in written), default=1.0),
    }
    for gate in GATES:
        accepted = [run for run in written if run["z"] > gate]
        found |= {f"z > {gate:g} writes": len(accepted), f"z > {gate:g}: harm": sum(run["harm"] for run in accepted)}
    return found


if __name__ == "__main__":
    print(json.dumps(gate_record(int(sys.argv[1]) if len(sys.argv) > 1 else NUM_SEEDS), indent=2))
