"""From layers and rows to deltas: reads the weights, tunes, and computes exactly what the deltas make of every row.

Shapes: n rows in all; Z (n, m) pre-activations of the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.errors import DataError
from farcast_cli.tune.delta import Delta
from farcast_cli.tune.layers import Stack, tune_layers
from farcast_cli.tune.objective import activate
from farcast_cli.tune.one_layer import Problem, Rows, Settings, tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName
    from farcast_cli.tune.data import Data, Splits
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

ANCHORED = 1e-9  # of a row's length: what anchors leave below it is rounding


@dataclass(frozen=True, slots=True)
class Model:
    """The layers that are tuned, in forward order, the activations between them, and what comes after the last."""

    weights: tuple[Weight, ...]
    between: tuple[ActivationName, ...]
    objective: Objective

    def pre(self, inputs: Array, deltas: Sequence[Delta] = ()) -> Array:
        """Z (n, m) of the last layer, with the deltas if any, in one pass over each layer."""
        pre = inputs
        for number, weight in enumerate(self.weights):
            extended = weight.extended(activate(self.between[number - 1], pre) if number else inputs)
            pre = weight.forward(extended)
            if deltas:
                pre = deltas[number].applied(pre, extended @ deltas[number].directions.T)
        return pre


@dataclass(frozen=True, slots=True)
class Solved:
    """What a tuning came to: the deltas, each row's loss without and with them, and how it went."""

    deltas: tuple[Delta, ...]
    before: Array
    after: Array
    losses: list[float]
    early_losses: list[float]
    best: int
    sizes: tuple[float, ...]
    """||W - W_0|| / ||W_0|| of each layer."""
    num_passes: int
    """Over the weights, for all iterations together."""
    notes: tuple[str, ...] = field(default=())


def solve(model: Model, data: Data, splits: Splits, settings: Settings, *, anchors: Array | None = None) -> Solved:
    """Tune on some rows until others stop it.

    Raises:
        DataError: anchors that leave nothing to tune.
        NonFiniteError: a weight that holds NaN or infinity.
    """
    if len(model.weights) > 1:
        return _solve_several(model, data, splits, settings)
    (weight,) = model.weights
    inputs = weight.extended(data.inputs)
    base = weight.forward(inputs)
    directions = inputs[splits.tuned] if anchors is None else _beside_anchors(inputs[splits.tuned], weight.extended(anchors))
    rows = Rows(base, inputs @ directions.T, data.targets)
    problem = Problem(model.objective, _some(rows, splits.tuned), _some(rows, splits.early))
    found = tune(problem, settings)
    delta = Delta(weight.name, weight.bias_name, found.point.scale, found.point.factors, directions, weight.checksum)
    after = model.objective.row_losses(delta.applied(base, rows.overlap), data.targets)
    return Solved(
        (delta,),
        model.objective.row_losses(base, data.targets),
        after,
        found.losses,
        found.early_losses,
        found.best,
        (_size(delta, base[splits.tuned], rows.overlap[splits.tuned], weight.square),),
        weight.num_passes,
    )


def _some(rows: Rows, chosen: NDArray[np.int64]) -> Rows:
    return Rows(rows.base[chosen], rows.overlap[chosen], rows.targets[chosen])


def _beside_anchors(inputs: Array, anchors: Array) -> Array:
    """What of the inputs (n, m_in) is orthogonal to all anchor rows: a change along it leaves the anchors' Z as it was.

    The projection is taken twice, which makes it exact to rounding.
    """
    _, sizes, basis = np.linalg.svd(anchors, full_matrices=False)
    basis = basis[sizes > sizes[0] * len(anchors) * np.finfo(np.float64).eps]
    left: Array = inputs - inputs @ basis.T @ basis
    left = left - left @ basis.T @ basis
    if np.linalg.norm(left) <= ANCHORED * np.linalg.norm(inputs):
        raise DataError(
            f"--anchor: {len(anchors)} rows span all inputs ({len(basis)} dimensions of {inputs.shape[1]}): no input is left to tune",
            hint="give fewer anchor rows",
        )
    return left


def _size(delta: Delta, base: Array, overlap: Array, square: float) -> float:
    """||W - W_0|| / ||W_0||, from <W_0, U^T D> = <U, Z_0> (c is 1 where there are anchors) and |U^T D|^2 = <U, K U>."""
    away = delta.scale - 1
    cross = float(np.vdot(delta.factors, base)) if away else 0.0
    own = float(np.vdot(delta.factors, overlap @ delta.factors))
    return float(np.sqrt(max(away * away * square + 2 * away * cross + own, 0.0) / square)) if square else np.inf


def _solve_several(model: Model, data: Data, splits: Splits, settings: Settings) -> Solved:
    chosen = np.concatenate([splits.tuned, splits.early])
    stack = Stack(model.weights, model.between, model.objective)
    before = model.objective.row_losses(model.pre(data.inputs), data.targets)
    found = tune_layers(stack, data.inputs[chosen], data.targets[chosen], settings, num_tuned=len(splits.tuned))
    num_passes = sum(weight.num_passes for weight in model.weights)
    after = model.objective.row_losses(model.pre(data.inputs, found.deltas), data.targets)
    return Solved(
        found.deltas, before, after, found.losses, found.early_losses, found.best, found.sizes, num_passes, found.notes
    )
