"""The labelled rows: read from a file, seen to fit the layer, and put into folds.

Knows what a person can get wrong in such a file. x holds inputs of the (first) layer, y its targets, or labels. Three more arrays
may be there: `out`, what the model gave for these rows; `w`, the rows' weights; `groups`, numbers of what belongs together.

Shapes: x (n, m_in), y (n, k) or labels (n,), out (n, k), w and groups (n,).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.choices import FOLDS
from farcast_cli.errors import DataError
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
    Numbers = NDArray[np.int64]

MAX_NUMBERS = 1 << 27  # of x, and of y, that are kept: 1 GiB of float64
_BY_CLASS = "save labels as whole numbers from 0: y.astype('int64')"


@dataclass(frozen=True, slots=True)
class Data:
    """Rows in float64 (labels: int64)."""

    path: Path
    inputs: Array
    targets: NDArray[Any]
    groups: Numbers
    """Equal numbers, from 0, for rows of equal x and for rows that the file says belong together."""
    shares: Array
    """The rows' weights, which sum to 1."""
    out: Array | None = None
    num_copies: int = 0
    """Rows whose x an earlier one has."""

    @property
    def num_rows(self) -> int:
        return len(self.inputs)

    @property
    def is_constant(self) -> bool:
        """Whether all rows have the same target, or label."""
        return not (self.targets != self.targets[:1]).any()

    @property
    def num_groups(self) -> int:
        return int(self.groups.max(initial=-1)) + 1


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

    def of(self, num_rows: int) -> Numbers:
        if self.count >= num_rows:
            return np.arange(num_rows)
        return np.sort(np.random.default_rng(self.seed).permutation(num_rows)[: self.count])


def read_data(path: Path, loss: LossName, *, fit: Fit | None = None, draw: Draw | None = None) -> Data:
    """Read the rows, whatever their element type, and check them; what their headers tell is checked before they are read.

    All rows are looked at, some MiB at a time, and those drawn are kept.

    Raises:
        FileFormatError: no such file, none of the formats, or damaged.
        DataError: an array is missing, of the wrong kind, shape or width, or holds NaN, infinity or labels outside the outputs.
    """
    arrays = open_rows(path, ("x", "y"), optional=("out", "w", "groups"))
    x, y = arrays["x"], arrays["y"]
    check_matrix(x)
    is_labels = loss == "cross-entropy" or _names_classes(y, fit)
    (_check_labels if is_labels else check_matrix)(y)
    for array in arrays.values():
        if array.shape[0] != x.shape[0]:
            raise DataError(
                f"{path}: expected as many rows of {array.name} as of x, found x {list(x.shape)} and {array.name} {list(array.shape)}",
                hint=f"each row of {array.name} belongs to the same row of x",
            )
    if fit:
        _check_fit(arrays, fit, is_labels=is_labels)
    for array in arrays.values():
        _check_size(array, min(draw.count, x.shape[0]) if draw else x.shape[0])
    rows = draw.of(x.shape[0]) if draw else np.arange(x.shape[0])
    inputs, moves = _read_rows(x, rows)
    if not moves:
        raise DataError(
            f"{path}: x is constant: all {x.shape[0]} rows are the same",
            hint="save one row for each example; for an edit, rows of some variants of its text",
        )
    targets, _ = _read_rows(y, rows, as_numbers=is_labels)
    if fit and is_labels:
        _check_range(path, targets, rows, fit.num_outputs)
    groups, num_copies = _groups(inputs, _read_numbers(arrays.get("groups"), rows))
    out = _read_rows(arrays["out"], rows)[0] if "out" in arrays else None
    return Data(path, inputs, targets, groups, _shares(arrays.get("w"), rows), out, num_copies)


def read_anchors(path: Path, layer: Weight) -> Array:
    """The inputs x (n, m_in) whose outputs must stay, or change little."""
    x = open_rows(path, ("x",))["x"]
    check_matrix(x)
    check_width(x, layer, what="--anchor: x")
    _check_size(x, x.shape[0])
    return read_whole(x)


def read_whole(array: StoredArray) -> Array:
    """All of an array of numbers, (n, columns)."""
    return _read_rows(array, np.arange(array.shape[0]))[0]


def check_enough(data: Data, *, what: str) -> None:
    """See that there are rows enough to judge by.

    Raises:
        DataError: there are fewer.
    """
    if data.num_rows < MIN_ROWS or data.num_groups < MIN_ROWS // 2:
        raise DataError(
            f"{data.path}: {what} {data.num_rows} rows, {data.num_groups} of them different or in groups of their own:"
            f" expected at least {MIN_ROWS}, half of them different",
            hint="give more rows, such as variants of a text for an edit; or let other rows judge, with --val FILE: then two rows suffice",
        )


def folds_of(data: Data, *, seed: int, one_by_one: bool) -> Numbers:
    """Which rows are left out together, numbered from 0: each by itself, or `FOLDS` folds drawn by the seed.

    Rows of one group are never in two folds.
    """
    if one_by_one and data.num_groups == data.num_rows:
        return data.groups
    order = np.random.default_rng(seed).permutation(data.num_groups)
    sizes = np.bincount(data.groups)
    filled, fold_of = np.zeros(min(FOLDS, data.num_groups)), np.empty(data.num_groups, np.int64)
    for group in order:
        fold_of[group] = fold = int(np.argmin(filled))
        filled[fold] += sizes[group]
    return np.asarray(fold_of[data.groups])


# --- before it is read -----------------------------------------------------------------------------------------------


def _names_classes(y: StoredArray, fit: Fit | None) -> bool:
    """Whether y holds labels where targets may stand: whole numbers, one a row, beside several outputs."""
    return fit is not None and fit.num_outputs > 1 and y.dtype.kind in "iu" and y.shape[1:] in {(), (1,)}


def check_matrix(array: StoredArray) -> None:
    """See that these are rows of numbers; a y of one dimension is one column."""
    is_column = array.name == "y" and len(array.shape) == 1
    if (len(array.shape) == 2 or is_column) and all(array.shape) and array.dtype.kind in "fiu":  # noqa: PLR2004 - rows of numbers
        return
    hint = ""
    if len(array.shape) == 3:  # noqa: PLR2004 - texts of tokens
        hint = f"one row for each token: {array.name}.reshape(-1, {array.shape[2]}), and groups with the number of its text for each"
    elif array.dtype.kind == "b":
        hint = _BY_CLASS if array.name == "y" else f"{array.name}.astype('float32')"
    raise DataError(
        f"{array.path}: {array.name}: expected rows of numbers, found {array.dtype} of shape {list(array.shape)}", hint=hint
    )


def _check_labels(array: StoredArray) -> None:
    if array.shape[1:] in {(), (1,)} and array.shape and array.dtype.kind in "iu":
        return
    is_one_hot = len(array.shape) == 2 and array.shape[1] > 1  # noqa: PLR2004 - a column for each class
    raise DataError(
        f"{array.path}: y: expected whole-numbered labels, one a row, for cross-entropy, found {array.dtype}"
        f" of shape {list(array.shape)}",
        hint="if y is one-hot: y.argmax(axis=1); --loss mse takes targets" if is_one_hot else _BY_CLASS,
    )


def _check_fit(arrays: dict[str, StoredArray], fit: Fit, *, is_labels: bool) -> None:
    check_width(arrays["x"], fit.layers[0])
    for name in ("out",) if is_labels else ("out", "y"):
        array = arrays.get(name)
        columns = 0 if array is None else array.shape[1] if len(array.shape) > 1 else 1
        if array is not None and (columns != fit.num_outputs or len(array.shape) > 2):  # noqa: PLR2004 - rows of numbers
            raise DataError(
                f"{array.path}: {name}: expected {fit.num_outputs} columns, one for each output, found {columns}",
                hint=f"{name} contains {'targets' if name == 'y' else 'outputs'} of the layer, or of the head if there is one",
            )


def check_width(x: StoredArray, layer: Weight, *, what: str = "x") -> None:
    """See that these are inputs of a layer."""
    width, found = layer.num_inputs, x.shape[1]
    if found == width:
        return
    shape = f"{layer.name} is {layer.num_outputs} x {width}, outputs x inputs"
    hint = layer.turn_hint if found == layer.num_outputs else "x holds the inputs of the layer, not of the model"
    raise DataError(f"{x.path}: {what}: expected {width} columns ({shape}), found {found}", hint=hint)


def _check_size(array: StoredArray, num_rows: int) -> None:
    if num_rows * prod(array.shape[1:]) > MAX_NUMBERS:
        raise DataError(
            f"{array.path}: {array.name}: expected at most {MAX_NUMBERS} numbers, found {num_rows} rows of"
            f" {prod(array.shape[1:])}, {num_rows * prod(array.shape[1:]) / 2**27:.1f} GiB in float64",
            hint=f"--subsample {MAX_NUMBERS // prod(array.shape[1:])} uses some of them",
        )


# --- as it is read ---------------------------------------------------------------------------------------------------


def _read_rows(array: StoredArray, chosen: Numbers, *, as_numbers: bool = False) -> tuple[NDArray[Any], bool]:
    """The chosen rows of an array, in their order, as float64 (n, columns) or whole numbers (n,); and whether any two rows differ."""
    shape = (len(chosen),) if as_numbers else (len(chosen), prod(array.shape[1:]))
    kept = np.empty(shape, np.int64 if as_numbers else np.float64)
    first, differ, start = None, False, 0
    for block in array.blocks():
        check_finite(array, block, start)
        first = block[:1].copy() if first is None else first
        differ = differ or bool((block != first).any())
        low, high = np.searchsorted(chosen, (start, start + len(block)))
        kept[low:high] = block[chosen[low:high] - start].reshape(-1, *shape[1:])
        start += len(block)
    return kept, differ


def check_finite(array: StoredArray, block: NDArray[Any], start: int) -> None:
    """See that a block, which begins at row `start`, holds no NaN or infinity."""
    bad = ~np.isfinite(block)
    if bad.any():
        row, *column = np.argwhere(bad)[0]
        raise DataError(
            f"{array.path}: {array.name} holds {block[row, *column]} in row {start + row}, column {(*column, 0)[0]}:"
            " expected finite numbers",
            hint="remove such rows",
        )


def _check_range(path: Path, labels: Numbers, rows: Numbers, num_outputs: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_outputs))
    if len(wrong):
        raise DataError(
            f"{path}: y: expected labels from 0 to {num_outputs - 1}, found {labels[wrong[0]]} in row {rows[wrong[0]]}",
            hint="labels number the outputs of the head, from 0",
        )


def _read_numbers(array: StoredArray | None, rows: Numbers) -> Numbers | None:
    if array is None:
        return None
    if len(array.shape) != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{array.path}: groups: expected one whole number a row, found {array.dtype} of shape {list(array.shape)}",
            hint="numpy.unique(names, return_inverse=True)[1] numbers names",
        )
    return np.asarray(_read_rows(array, rows, as_numbers=True)[0])


def _shares(array: StoredArray | None, rows: Numbers) -> Array:
    if array is None:
        return np.full(len(rows), 1 / len(rows))
    if len(array.shape) != 1 or array.dtype.kind not in "fiu":
        raise DataError(f"{array.path}: w: expected one weight a row, found {array.dtype} of shape {list(array.shape)}")
    weights = _read_rows(array, rows)[0][:, 0]
    if (weights <= 0).any():
        row = int(rows[np.argmax(weights <= 0)])
        raise DataError(
            f"{array.path}: w: expected weights above 0, found {weights[weights <= 0][0]:g} in row {row}",
            hint="leave out rows that do not count",
        )
    return np.asarray(weights / weights.sum())


def _groups(inputs: Array, told: Numbers | None) -> tuple[Numbers, int]:
    """Numbers from 0 of rows that belong together: of equal x, or of one group; and how many rows are copies."""
    known: dict[bytes, int] = {}
    own = np.array([known.setdefault(row.tobytes(), len(known)) for row in inputs], dtype=np.int64)
    groups = own if told is None else told
    while True:  # a copy joins the groups of both rows
        least = np.full(own.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(least, own, groups)
        if told is None or (least[own] == groups).all():
            break
        _, told = np.unique(groups, return_inverse=True)
        by_group = np.full(told.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(by_group, told, least[own])
        groups = by_group[told]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64), len(inputs) - len(known)
