"""From layers and rows to deltas: reads the weights, chooses how far to go by rows left out, and tunes on all rows.

Shapes: n rows in all; m outputs of the last layer; d inputs of the first, with one for its bias; p places of a path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.errors import UsageError
from farcast_cli.tune.delta import Delta, truncated
from farcast_cli.tune.gate import Choice, choose
from farcast_cli.tune.layers import PATIENCE, Layer, Settings, Stack
from farcast_cli.tune.objective import activate, in_columns, softmax
from farcast_cli.tune.ridge import Ridge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import ActivationName
    from farcast_cli.tune.data import Data
    from farcast_cli.tune.metric import Metric
    from farcast_cli.tune.objective import Objective
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]
    Numbers = NDArray[np.int64]

MAX_TOGETHER = 1 << 21  # outputs of rows that are computed in one pass: 16 MiB
MAX_SCALED = 1 << 20  # outputs of rows up to which a last layer's path begins at the scaled closed form
SCALED_EVERY, SCALES = 5, tuple(2.0 ** (half / 2) for half in range(13))  # ridges, and factors of the fit, that are tried
LARGEST = 1e100  # of a loss that is not finite, or larger
ARRAYS, MAX_BYTES = 10, 2 << 30
"""Arrays of n x m numbers that Gauss-Newton holds at once, and the bytes that a tuning may take. Gradient descent of one layer
holds Z_0, that of a fold and the gradient, n x m each, and three arrays like U."""
FIXED = 1 << 27
"""Bytes of the libraries and of some rows' outputs: a head of 30,522 x 384 and 1,000 rows took 1,085 MiB, foretold 1,095."""


@dataclass(frozen=True, slots=True)
class Model:
    """The layers that are tuned, in forward order, the activations between them, and what comes after the last."""

    weights: tuple[Weight, ...]
    between: tuple[ActivationName, ...]
    objective: Objective

    @property
    def num_outputs(self) -> int:
        """Of the head, or of the last layer where there is none."""
        head = self.objective.head
        return self.weights[-1].num_outputs if head is None else len(head)

    def has_closed_form(self, settings: Settings) -> bool:
        """Whether a tuning with these settings is one."""
        after = self.objective
        is_linear = len(self.weights) == 1 and after.loss == "mse" and after.activation == "none" and after.head is None
        return is_linear and settings.method == "gauss-newton"

    def pre(self, inputs: Array, deltas: Sequence[Delta] = ()) -> Array:
        """Z (n, m) of the last layer, with the deltas if any, in one pass over each layer."""
        pre = inputs
        for number, weight in enumerate(self.weights):
            extended = weight.extended(activate(self.between[number - 1], pre) if number else inputs)
            pre = weight.forward(extended)
            if deltas:
                pre = deltas[number].applied(pre, extended @ deltas[number].directions.T)
        return pre

    def row_losses(self, inputs: Array, targets: NDArray[Any], deltas: Sequence[Delta] = ()) -> Array:
        """L of each row, (n,), some rows at a time."""
        widest = max(weight.num_outputs for weight in self.weights)
        count = max(1, MAX_TOGETHER // widest)
        parts = [slice(start, start + count) for start in range(0, len(inputs), count)]
        return np.concatenate([self.objective.row_losses(self.pre(inputs[p], deltas), targets[p]) for p in parts])


@dataclass(frozen=True, slots=True)
class Solved:
    """What a tuning came to: the deltas, each row's loss before, after, and by a tuning without it, and how it went."""

    deltas: tuple[Delta, ...]
    before: Array
    after: Array
    choice: Choice
    notes: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    """||W - W_0|| / ||W_0|| of each layer."""
    num_passes: int = 0
    """Over the weights, for all iterations together."""

    @property
    def left_out(self) -> Array:
        return self.choice.losses

    @property
    def place(self) -> int:
        """Of the path that was gone: 0 where no step helped."""
        return self.choice.place


def solve(model: Model, data: Data, folds: Numbers, settings: Settings, *, metric: Metric | None = None) -> Solved:
    """Choose how far to go by rows left out, then go there with all rows.

    Args:
        folds: (n,) which rows are left out together; numbers from 0.
        metric: what a change of the one layer costs; by default the same in all directions.

    Raises:
        DataError: anchors that leave nothing to tune, or more numbers than there is memory for.
        NonFiniteError: a weight that holds NaN or infinity.
    """
    passes = sum(weight.num_passes for weight in model.weights)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if model.has_closed_form(settings):
            found = _closed(model.weights[0], data, folds, settings, metric)
        else:
            _check_memory(model, data, settings)
            found = _iterated(_Start.of(model, data, settings, metric), folds)
    num_passes = sum(weight.num_passes for weight in model.weights) - passes
    sizes = tuple(_size(delta, weight) for delta, weight in zip(found.deltas, model.weights, strict=True))
    return replace(found, sizes=sizes, num_passes=num_passes)


def _size(delta: Delta, weight: Weight) -> float:
    """||W - W_0|| / ||W_0||; with weight decay, without what W_0 and the change have in common."""
    away = abs(delta.scale - 1) * np.sqrt(weight.square)
    return float(np.hypot(delta.size, away) / np.sqrt(weight.square)) if weight.square else np.inf


def _check_memory(model: Model, data: Data, settings: Settings) -> None:
    num_rows, num_outputs = data.num_rows, sum(weight.num_outputs for weight in model.weights)
    size = min(num_rows, model.weights[0].num_inputs)
    whole = sum(3 * (weight.num_inputs + 1) * weight.num_outputs for weight in model.weights[1:])
    newton = descent = 8 * (ARRAYS * num_rows * num_outputs + whole)
    if len(model.weights) == 1:
        descent = FIXED + 8 * 3 * (num_rows + size) * num_outputs
    else:
        short = sum(min(num_rows, 2 * weight.num_inputs) for weight in model.weights)
        newton += 8 * num_rows * (2 * model.num_outputs * num_outputs + short)
    need = descent if settings.method == "gradient-descent" else newton
    if need > MAX_BYTES:
        other = f"--method gradient-descent takes some {descent / 2**30:.1f} GiB; " if descent <= MAX_BYTES else ""
        raise UsageError(
            f"{data.path}: {num_rows} rows of {num_outputs} outputs would take some {need / 2**30:.1f} GiB of memory:"
            f" expected at most {MAX_BYTES >> 30} GiB",
            hint=f"{other}--subsample N uses fewer rows; for a last layer alone, --loss mse takes labels and much less memory",
        )


# --- the closed form -------------------------------------------------------------------------------------------------


def _closed(weight: Weight, data: Data, folds: Numbers, settings: Settings, metric: Metric | None) -> Solved:
    """One pass over W_0. Each row is left out by itself where it may be; else each fold is, and has sums of its own."""
    space = _Space.of(weight.extended(data.inputs), metric)
    is_alone = len(folds) == folds.max() + 1
    everything = np.arange(data.num_rows)
    whole = Ridge.of(space.part(everything), data.shares, is_dual=space.is_dual, num_outputs=weight.num_outputs)
    parts = [] if is_alone else [(everything[folds != fold], everything[folds == fold]) for fold in range(folds.max() + 1)]
    sums = [
        Ridge.of(
            space.part(tuned),
            data.shares[tuned] / data.shares[tuned].sum(),
            is_dual=space.is_dual,
            left_out=space.part(tuned, left),
        )
        for tuned, left in parts
    ]
    lengths = np.zeros(data.num_rows)
    for first, base in weight.outputs(space.inputs):
        residual = in_columns(data.targets, base.shape[1], first) - base
        lengths += (residual**2).sum(axis=1)
        whole.add(residual)
        for one, (tuned, left) in zip(sums, parts, strict=True):
            one.add(residual[tuned], residual[left])
    before = lengths / weight.num_outputs
    table = [before[None]]
    strengths = whole.strengths(settings.ridge)
    if is_alone:
        table.append(whole.losses(strengths))
    else:
        table.append(np.empty((len(strengths), data.num_rows)))
        for one, (_, left) in zip(sums, parts, strict=True):
            table[1][:, left] = one.losses(one.strengths(settings.ridge))
    choice = choose(np.concatenate(table), folds, data.shares)
    if not choice.place:
        nothing = _delta(weight, 1.0, np.zeros((1, weight.num_outputs)), np.zeros((1, space.inputs.shape[1])))
        return Solved((nothing,), before, before, choice)
    mu = strengths[choice.place - 1]
    after = whole.fitted(mu)
    delta = _delta(weight, 1.0, whole.factors(mu), space.directions(everything))
    how = "" if settings.ridge is not None else ", chosen by rows left out"
    return Solved((delta,), before, after, choice, (f"{weight.name}: ridge {2 * mu / weight.num_outputs:.3g}{how}",))


def _delta(weight: Weight, scale: float, factors: Array, directions: Array | None) -> Delta:
    factors, directions = truncated(factors, directions)
    return Delta(weight.name, weight.bias_name, scale, factors, directions, weight.checksum, weight.is_transposed)


@dataclass(frozen=True, slots=True)
class _Space:
    """The inputs in the coordinates that a change has: dual up to n = d, primal beyond."""

    inputs: Array
    """(n, d), and below X M^-1, with the basis M^-1/2 in the primal form."""
    free: Array
    basis: Array | None
    overlap: Array
    is_dual: bool

    @classmethod
    def of(cls, inputs: Array, metric: Metric | None) -> _Space:
        """With no metric, M is I."""
        free, basis = inputs, None
        is_dual = len(inputs) <= inputs.shape[1]
        if metric is not None:
            free = metric.freed(inputs)
            metric.check(inputs, free)
            basis = None if is_dual else metric.freed(np.eye(inputs.shape[1]), power=0.5)
        overlap = inputs @ free.T if is_dual else inputs if basis is None else inputs @ basis.T
        return cls(inputs, free, basis, overlap, is_dual)

    def part(self, tuned: Numbers, rows: Numbers | None = None) -> Array:
        """K of some rows, beside the rows that are tuned on; of these themselves by default."""
        if len(tuned) == len(self.overlap):
            return self.overlap
        chosen = self.overlap[tuned if rows is None else rows]
        return chosen[:, tuned] if self.is_dual else chosen

    def directions(self, tuned: Numbers) -> Array | None:
        return self.free[tuned] if self.is_dual else self.basis


# --- iterations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Start:
    """Where all paths begin: the first layer is read once, however many there are."""

    model: Model
    data: Data
    settings: Settings
    space: _Space
    base: Array

    @classmethod
    def of(cls, model: Model, data: Data, settings: Settings, metric: Metric | None) -> _Start:
        space = _Space.of(model.weights[0].extended(data.inputs), metric)
        return cls(model, data, settings, space, model.weights[0].forward(space.inputs))

    def stack(self, tuned: Numbers, left: Numbers) -> Stack:
        """The layers at W_0, and the rows."""
        rows = np.concatenate([tuned, left]) if len(left) else tuned
        base = self.base[rows] if len(left) else self.base
        first = Layer.first(base, self.space.part(tuned, rows), is_dual=self.space.is_dual)
        layers = [first, *(Layer.moving(weight) for weight in self.model.weights[1:])]
        shares = self.data.shares[tuned]
        return Stack(layers, self.model.objective, self.data.targets[rows], shares / shares.sum(), self.model.between)

    def path(self, stack: Stack) -> Iterator[Array]:
        """What all rows lose before each iteration."""
        return stack.walk(self.settings, self._scaled(stack))

    def _scaled(self, stack: Stack) -> Array | None:
        """For a last layer with labels: U of the closed form's fit of what the probabilities miss, scaled.

        The ridge and the scale have the least cross-entropy of rows left out, one by one, among the rows tuned on.
        """
        after, count = stack.objective, stack.num_tuned
        base, overlap, targets = (one[:count] for one in (stack.layers[0].base, stack.layers[0].overlap, stack.targets))
        is_last = len(stack.layers) == 1 and after.loss == "cross-entropy" and after.activation == "none" and after.head is None
        if not is_last or self.settings.method != "gauss-newton" or self.settings.ridge or base.size > MAX_SCALED:
            return None
        missed = in_columns(targets, base.shape[1]) - softmax(base)
        fit = Ridge.of(overlap, stack.shares, is_dual=self.space.is_dual, num_outputs=base.shape[1])
        fit.add(missed)
        least, best = np.inf, (0.0, 1.0)
        for mu in fit.strengths(None)[::SCALED_EVERY]:
            change = fit.change(missed, mu)
            for scale in SCALES:
                loss = stack.loss(after.row_losses(base + scale * change, targets))
                if loss < least:
                    least, best = loss, (mu, scale)
        return best[1] * fit.factors(best[0])

    def deltas(self, stack: Stack, tuned: Numbers) -> tuple[Delta, ...]:
        """Where the layers stand."""
        own = (self.space.directions(tuned), *(None for _ in stack.layers[1:]))
        found = zip(self.model.weights, stack.layers, own, strict=True)
        return tuple(_delta(weight, layer.scale, layer.factors.copy(), directions) for weight, layer, directions in found)


def _iterated(start: _Start, folds: Numbers) -> Solved:
    """The paths of the folds, then that of all rows to the place that the rows left out have chosen."""
    data, method = start.data, start.settings.method
    everything = np.arange(data.num_rows)
    parts: list[tuple[Numbers, list[Array]]] = []
    for fold in range(folds.max() + 1):
        tuned, left = everything[folds != fold], everything[folds == fold]
        losses: list[Array] = []
        shares, least, best = data.shares[left], np.inf, 0
        for lost in start.path(start.stack(tuned, left)):
            losses.append(np.nan_to_num(lost[len(tuned) :], nan=LARGEST, posinf=LARGEST))
            if (loss := shares @ losses[-1]) < least:
                least, best = loss, len(losses) - 1
            if len(losses) - 1 - best >= PATIENCE[method]:
                break
        parts.append((left, losses))
    table = np.empty((max(len(losses) for _, losses in parts), data.num_rows))
    for left, losses in parts:
        table[:, left] = losses + [losses[-1]] * (len(table) - len(losses))
    choice = choose(table, folds, data.shares)
    stack = start.stack(everything, everything[:0])
    path = list(islice(start.path(stack), choice.place + 1))
    notes: tuple[str, ...] = ()
    if len(table) == 1 or table[-1].max() >= LARGEST:
        notes = (f"{method} diverged: the losses grow without bound: lower --rate",)
    return Solved(start.deltas(stack, everything), path[0], path[-1], choice, notes)
