"""The labelled rows: read from a file, seen to fit the layer, and split into those tuned on, those that stop, those that judge.

Knows what a person can get wrong in such a file. x holds inputs of the (first) layer, y its targets, or labels.

Shapes: x (n, m_in), y (n, k) or labels (n,).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.errors import DataError, FarcastError, FileFormatError, UnsafeFileError, UsageError
from farcast_cli.formats.files import file_size, open_input, reading
from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.tensors import FLOATING
from farcast_cli.tune.gate import MIN_ROWS
from farcast_cli.tune.weight import read_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.tune.objective import LossName
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

HOLDOUT = 0.25
EARLY_SHARE = 0.5  # of the held-out share: the early-stopping rows, a noisier choice than the gate's
_INTEGERS = {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "uint16": "<u2", "uint32": "<u4"}


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


def read_data(path: Path, loss: LossName) -> Data:
    """Read x and y, whatever their element type, and check what can be checked without the layer.

    Raises:
        FileFormatError: no such file, or none of the two formats.
        DataError: x or y is missing, of the wrong kind or shape, or holds NaN or infinity.
    """
    arrays = _read_arrays(path, ("x", "y"))
    inputs = _matrix(path, "x", arrays["x"])
    targets = _labels(path, arrays["y"]) if loss == "cross-entropy" else _matrix(path, "y", _upright(arrays["y"]))
    if len(inputs) != len(targets):
        raise DataError(
            f"{path}: expected as many rows of y as of x, found x {list(inputs.shape)} and y {list(targets.shape)}",
            hint="each row of y belongs to the same row of x",
        )
    if not (inputs != inputs[:1]).any():
        raise DataError(f"{path}: x is constant: all {len(inputs)} rows are the same", hint="save one row for each example")
    return Data(path, inputs, targets, _groups(inputs))


def read_anchors(path: Path) -> Array:
    """The inputs x (n, m_in) whose outputs must stay."""
    return _matrix(path, "x", _read_arrays(path, ("x",))["x"])


def check_fit(data: Data, layers: list[Weight], *, num_outputs: int, loss: LossName, anchors: Array | None) -> None:
    """See that rows fit a layer, or the first of several.

    Args:
        num_outputs: of the head, or of the last layer.

    Raises:
        DataError: widths that differ, labels outside the outputs.
        UsageError: more rows than tuning pays for.
    """
    _check_width(data.path, data.inputs, layers[0])
    if anchors is not None:
        _check_width(data.path, anchors, layers[0], what="--anchor: x")
    if loss == "mse" and data.targets.shape[1] != num_outputs:
        raise DataError(
            f"{data.path}: y: expected {num_outputs} columns, one for each output, found {data.targets.shape[1]}",
            hint="y holds targets of the layer, or of the head where one is given",
        )
    if loss == "cross-entropy" and (data.targets.min() < 0 or data.targets.max() >= num_outputs):
        wrong = int(np.flatnonzero((data.targets < 0) | (data.targets >= num_outputs))[0])
        raise DataError(
            f"{data.path}: y: expected labels from 0 to {num_outputs - 1}, found {data.targets[wrong]} in row {wrong}",
            hint="labels number the outputs of the head, from 0",
        )
    narrowest = min(layer.num_outputs for layer in layers)
    if data.num_rows > 2 * narrowest:
        raise UsageError(
            f"{data.path}: {data.num_rows} rows, more than twice the {narrowest} outputs of the layer: ordinary training"
            " is cheaper there",
            hint=f"--subsample {2 * narrowest} or fewer tunes on some of them",
        )


def subsample(data: Data, count: int, *, seed: int) -> Data:
    """Some of the rows, drawn by the seed, in their order."""
    if count >= data.num_rows:
        return data
    rows = np.sort(np.random.default_rng(seed).permutation(data.num_rows)[:count])
    return Data(data.path, data.inputs[rows], data.targets[rows], _groups(data.inputs[rows]))


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
            f"{data.path}: the gate would judge on {len(found.gate)} of {data.num_rows} rows, {to_gate} of them distinct:"
            f" expected at least {MIN_ROWS}, half of them distinct",
            hint=f"give {need} rows or more, or hold out a larger share with --holdout",
        )
    if not len(found.tuned) or not len(found.early):
        raise UsageError(f"--holdout {holdout:g}: leaves no rows to tune on", hint=f"--holdout {HOLDOUT}")
    return found


# --- the file --------------------------------------------------------------------------------------------------------


def _read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The named arrays of a .safetensors or .npz file."""
    if path.suffix not in {".safetensors", ".npz"}:
        raise UsageError(f"{path}: expected a .safetensors or .npz file with {' and '.join(names)}")
    file_size(path)  # which says that it is not there
    found = _from_safetensors(path, names) if path.suffix == ".safetensors" else _from_npz(path, names)
    for name in names:
        if name not in found:
            raise DataError(f"{path}: no array {name!r}", hint="x holds the inputs of the layer, y its targets or labels")
    return found


def _from_safetensors(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for entry in read_safetensors(path).entries:
        if entry.name not in names:
            continue
        if entry.dtype.name in FLOATING:
            found[entry.name] = read_tensor(entry)[0].reshape(entry.shape)
        elif entry.dtype.name in _INTEGERS:
            found[entry.name] = read_tensor(entry, _INTEGERS[entry.dtype.name])[0].reshape(entry.shape)
        else:
            raise DataError(f"{path}: {entry.name} is {entry.dtype.name}: expected plain numbers")
    return found


def _from_npz(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    try:
        with reading(path), open_input(path) as raw:
            if not zipfile.is_zipfile(raw):
                raise _not_npz(path, "no zip file")
            raw.seek(0)
            with np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in names if name in file.files}
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise UnsafeFileError(f"{path}: holds pickled objects, which may run code: expected plain arrays") from error
        raise _not_npz(path, error) from error
    except (EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise _not_npz(path, error) from error


def _not_npz(path: Path, error: object) -> FarcastError:
    return FileFormatError(f"{path}: not a readable .npz file: {error}", hint="write it with numpy.savez(FILE, x=..., y=...)")


def _upright(values: NDArray[Any]) -> NDArray[Any]:
    return values[:, None] if values.ndim == 1 else values


def _matrix(path: Path, name: str, values: NDArray[Any]) -> Array:
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":  # noqa: PLR2004 - rows of numbers
        raise DataError(f"{path}: {name}: expected rows of numbers, found {values.dtype} of shape {list(values.shape)}")
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise DataError(
            f"{path}: {name} holds {values[row, column]} in row {row}, column {column}: expected finite numbers",
            hint="leave such rows out",
        )
    return values.astype(np.float64)


def _labels(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values  # noqa: PLR2004 - a column
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(
            f"{path}: y: expected whole-numbered labels, one a row, for cross-entropy, found {values.dtype}"
            f" of shape {list(values.shape)}",
            hint="--loss mse takes targets",
        )
    return values.astype(np.int64)


def _groups(inputs: Array) -> NDArray[np.int64]:
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(row.tobytes(), len(known)) for row in inputs], dtype=np.int64)


def _check_width(path: Path, inputs: Array, layer: Weight, *, what: str = "x") -> None:
    width, found = layer.num_inputs, inputs.shape[1]
    if found == width:
        return
    shape = f"{layer.name} is {layer.num_outputs} x {width}, outputs x inputs"
    hint = (
        f"{layer.name} may be stored as inputs x outputs, as GPT-2's Conv1D is: save its transpose as a linear layer"
        if found == layer.num_outputs
        else "x holds the inputs of the layer, not of the model"
    )
    raise DataError(f"{path}: {what}: expected {width} columns ({shape}), found {found}", hint=hint)
