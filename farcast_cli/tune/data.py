"""The labelled rows: read from a file, seen to fit the layer, and split into those tuned on, those that stop, those that judge.

Knows what a person can get wrong in such a file. x holds inputs of the (first) layer, y its targets, or labels.

Shapes: x (n, m_in), y (n, k) or labels (n,).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.choices import HOLDOUT
from farcast_cli.errors import DataError, UsageError
from farcast_cli.tune.gate import MIN_ROWS
from farcast_cli.tune.rows_file import open_rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import LossName
    from farcast_cli.tune.rows_file import StoredArray
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

EARLY_SHARE = 0.5  # of the held-out share: the early-stopping rows, a noisier choice than the gate's
MAX_NUMBERS = 1 << 27  # of x, and of y, that are kept: 1 GiB of float64


@dataclass(frozen=True, slots=True)
class Data:
    """Rows in float64 (labels: int64). `groups` has equal numbers for rows of equal x."""

    path: Path
    inputs: Array
    targets: NDArray[Any]
    groups: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.inputs)

    @property
    def num_copies(self) -> int:
        """Rows whose x an earlier one has."""
        return self.num_rows - int(self.groups.max(initial=-1)) - 1


@dataclass(frozen=True, slots=True)
class Splits:
    """Which rows are tuned on, which stop the tuning early, and which judge what came of it."""

    tuned: NDArray[np.int64]
    early: NDArray[np.int64]
    gate: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fit:
    """What rows must fit: layers from the first to the last, and the outputs of the head, or of the last layer."""

    layers: Sequence[Weight]
    num_outputs: int


@dataclass(frozen=True, slots=True)
class Draw:
    """Some of the rows, drawn by the seed, in their order."""

    count: int
    seed: int

    def of(self, num_rows: int) -> NDArray[np.int64]:
        if self.count >= num_rows:
            return np.arange(num_rows)
        return np.sort(np.random.default_rng(self.seed).permutation(num_rows)[: self.count])


def read_data(path: Path, loss: LossName, *, fit: Fit | None = None, draw: Draw | None = None) -> Data:
    """Read x and y, whatever their element type, and check them; what their headers tell is checked before they are read.

    All rows are looked at, some MiB at a time, and those drawn are kept.

    Raises:
        FileFormatError: no such file, none of the two formats, or damaged.
        DataError: x or y is missing, of the wrong kind, shape or width, or holds NaN, infinity or labels outside the outputs.
        UsageError: more rows than tuning pays for.
    """
    arrays = open_rows(path, ("x", "y"))
    x, y = arrays["x"], arrays["y"]
    _check_matrix(x)
    (_check_labels if loss == "cross-entropy" else _check_matrix)(y)
    if x.shape[0] != y.shape[0]:
        raise DataError(
            f"{path}: expected as many rows of y as of x, found x {list(x.shape)} and y {list(y.shape)}",
            hint="each row of y belongs to the same row of x",
        )
    num_kept = min(draw.count, x.shape[0]) if draw else x.shape[0]
    if fit:
        _check_fit(x, y, fit, loss=loss, num_kept=num_kept)
    for array in (x, y):
        _check_size(array, num_kept)
    rows = draw.of(x.shape[0]) if draw else np.arange(x.shape[0])
    inputs, moves = _read_rows(x, rows)
    if not moves:
        raise DataError(f"{path}: x is constant: all {x.shape[0]} rows are the same", hint="save one row for each example")
    targets, _ = _read_rows(y, rows, labels=loss == "cross-entropy")
    if fit and loss == "cross-entropy":
        _check_range(path, targets, rows, fit.num_outputs)
    return Data(path, inputs, targets, _groups(inputs))


def read_anchors(path: Path, layer: Weight) -> Array:
    """The inputs x (n, m_in) whose outputs must stay."""
    x = open_rows(path, ("x",))["x"]
    _check_matrix(x)
    _check_width(x, layer, what="--anchor: x")
    _check_size(x, x.shape[0])
    return _read_rows(x, np.arange(x.shape[0]))[0]


def split(data: Data, *, holdout: float, seed: int) -> Splits:
    """Draw the held-out and the early-stopping rows by the seed; copies of a row are never on two sides.

    Raises:
        UsageError: a share that is none, or one that leaves too few rows.
    """
    if not 0 < holdout < 1 / (1 + EARLY_SHARE):
        raise UsageError(f"--holdout {holdout:g}: expected a share between 0 and {1 / (1 + EARLY_SHARE):.2f}")
    order = np.random.default_rng(seed).permutation(int(data.groups.max()) + 1)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    sizes = np.cumsum(np.bincount(data.groups)[order])
    to_gate = int(np.searchsorted(sizes, round(holdout * data.num_rows))) + 1
    to_early = int(np.searchsorted(sizes, round((1 + EARLY_SHARE) * holdout * data.num_rows))) + 1
    rank = place[data.groups]
    found = Splits(
        *(np.flatnonzero(chosen) for chosen in (rank >= to_early, (rank >= to_gate) & (rank < to_early), rank < to_gate))
    )
    if len(found.gate) < MIN_ROWS or to_gate < MIN_ROWS // 2:
        need = int(np.ceil(MIN_ROWS / holdout))
        raise DataError(
            f"{data.path}: the gate would use {len(found.gate)} of {data.num_rows} rows, {to_gate} of them different:"
            f" expected at least {MIN_ROWS}, half of them different",
            hint=f"give at least {need} rows, or hold out a larger share with --holdout",
        )
    if not len(found.tuned) or not len(found.early):
        raise UsageError(f"--holdout {holdout:g}: leaves no rows to tune on", hint=f"--holdout {HOLDOUT}")
    return found


# --- before it is read -----------------------------------------------------------------------------------------------


def _check_matrix(array: StoredArray) -> None:
    """Rows of numbers; a y of one dimension is one column."""
    is_column = array.name == "y" and len(array.shape) == 1
    if (len(array.shape) != 2 and not is_column) or not all(array.shape) or array.dtype.kind not in "fiu":  # noqa: PLR2004 - rows of numbers
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise DataError(f"{array.path}: {array.name}: expected rows of numbers, found {found}")


def _check_labels(array: StoredArray) -> None:
    if array.shape[1:] not in {(), (1,)} or not array.shape or array.dtype.kind not in "iu":
        raise DataError(
            f"{array.path}: y: expected whole-numbered labels, one a row, for cross-entropy, found {array.dtype}"
            f" of shape {list(array.shape)}",
            hint="--loss mse takes targets",
        )


def _check_fit(x: StoredArray, y: StoredArray, fit: Fit, *, loss: LossName, num_kept: int) -> None:
    _check_width(x, fit.layers[0])
    columns = y.shape[1] if len(y.shape) > 1 else 1
    if loss == "mse" and columns != fit.num_outputs:
        raise DataError(
            f"{y.path}: y: expected {fit.num_outputs} columns, one for each output, found {columns}",
            hint="y contains targets of the layer, or of the head if there is one",
        )
    narrowest = min(layer.num_outputs for layer in fit.layers)
    if num_kept > 2 * narrowest:
        raise UsageError(
            f"{x.path}: {num_kept} rows, more than twice the {narrowest} outputs of the layer: ordinary training"
            " is cheaper there",
            hint=f"--subsample {2 * narrowest} or fewer tunes on some of them",
        )


def _check_width(x: StoredArray, layer: Weight, *, what: str = "x") -> None:
    width, found = layer.num_inputs, x.shape[1]
    if found == width:
        return
    shape = f"{layer.name} is {layer.num_outputs} x {width}, outputs x inputs"
    hint = (
        f"{layer.name} may be stored as inputs x outputs, as GPT-2's Conv1D is: save its transpose as a linear layer"
        if found == layer.num_outputs
        else "x holds the inputs of the layer, not of the model"
    )
    raise DataError(f"{x.path}: {what}: expected {width} columns ({shape}), found {found}", hint=hint)


def _check_size(array: StoredArray, num_rows: int) -> None:
    if num_rows * prod(array.shape[1:]) > MAX_NUMBERS:
        raise DataError(
            f"{array.path}: {array.name}: expected at most {MAX_NUMBERS} numbers, found {num_rows} rows of"
            f" {prod(array.shape[1:])}",
            hint="save fewer rows",
        )


# --- as it is read ---------------------------------------------------------------------------------------------------


def _read_rows(array: StoredArray, chosen: NDArray[np.int64], *, labels: bool = False) -> tuple[NDArray[Any], bool]:
    """The chosen rows of an array, in their order, as float64 (n, columns) or labels (n,); and whether any two rows differ."""
    shape = (len(chosen),) if labels else (len(chosen), prod(array.shape[1:]))
    kept = np.empty(shape, np.int64 if labels else np.float64)
    first, differ, start = None, False, 0
    for block in array.blocks():
        _check_finite(array, block, start)
        first = block[:1].copy() if first is None else first
        differ = differ or bool((block != first).any())
        low, high = np.searchsorted(chosen, (start, start + len(block)))
        kept[low:high] = block[chosen[low:high] - start].reshape(-1, *shape[1:])
        start += len(block)
    return kept, differ


def _check_finite(array: StoredArray, block: NDArray[Any], start: int) -> None:
    bad = ~np.isfinite(block)
    if bad.any():
        row, *column = np.argwhere(bad)[0]
        raise DataError(
            f"{array.path}: {array.name} holds {block[row, *column]} in row {start + row}, column {(*column, 0)[0]}:"
            " expected finite numbers",
            hint="remove such rows",
        )


def _check_range(path: Path, labels: NDArray[np.int64], rows: NDArray[np.int64], num_outputs: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_outputs))
    if len(wrong):
        raise DataError(
            f"{path}: y: expected labels from 0 to {num_outputs - 1}, found {labels[wrong[0]]} in row {rows[wrong[0]]}",
            hint="labels number the outputs of the head, from 0",
        )


def _groups(inputs: Array) -> NDArray[np.int64]:
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(row.tobytes(), len(known)) for row in inputs], dtype=np.int64)
