"""What a change of a layer costs in each direction of its inputs: the same in all, or more where other inputs lie.

    |V|^2 = tr(V M V^T),   M = I + weight C d / tr C,   C the mean of x x^T

Hard anchors forbid a change: V x = 0 for each of their rows x. Soft ones are M's: V x gets smaller, on average over rows x, the
larger the weight. Both can be there; then M counts on what the hard ones leave. A solver needs M only as X M^-1, the directions of
the dual form, and as M^-1/2, the basis of the primal one.

A covariance file is a safetensors file with `moment` (d, d), the mean of x x^T, and `mean` (d,), both in float64, and the number
of rows in its metadata.

Shapes: n rows, d inputs, with one for the bias; h directions held, q soft ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.errors import DataError, OutputError
from farcast_cli.files.place import open_new
from farcast_cli.files.staged import refuse_existing, staged
from farcast_cli.formats.safetensors_file import read_safetensors, write_arrays
from farcast_cli.tune.data import check_finite, check_matrix, check_width, read_whole
from farcast_cli.tune.rows_file import open_rows

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

ANCHORED = 1e-9  # of a row's length: what anchors leave below it is rounding
FORMAT = "farcast covariance 1"
MAX_WIDTH = 8192  # inputs of a covariance: 512 MiB, and some minutes for its eigenvectors
NEGATIVE = 1e-6  # of the largest eigenvalue: what is further below 0 is no covariance


@dataclass(frozen=True, slots=True)
class Metric:
    """M^-1 by its eigenvectors: 0 along `held`, `shares` along `axes`, 1 elsewhere."""

    held: Array
    """(h, d), orthonormal."""
    axes: Array
    """(q, d), orthonormal, and orthogonal to what is held."""
    shares: Array
    num_anchors: int = 0

    @classmethod
    def hard(cls, anchors: Array) -> Metric:
        """Anchor rows (n, d) whose outputs must stay."""
        _, sizes, axes = np.linalg.svd(anchors, full_matrices=False)
        held = axes[: int((sizes > sizes[0] * len(anchors) * np.finfo(np.float64).eps).sum())]
        return cls(held, axes[:0], sizes[:0], len(anchors))

    @classmethod
    def none(cls, width: int) -> Metric:
        return cls(np.empty((0, width)), np.empty((0, width)), np.empty(0))

    def with_rows(self, rows: Array, weight: float) -> Metric:
        """The same, with soft anchor rows (n, d)."""
        _, roots, axes = np.linalg.svd(self.freed(rows), full_matrices=False)
        return self._with(roots**2, axes, weight * rows.shape[1] / float(np.vdot(rows, rows)))

    def with_moment(self, moment: Array, weight: float) -> Metric:
        """The same, with C (d, d), the mean of x x^T."""
        sizes, turned = np.linalg.eigh(self.freed(self.freed(moment).T))
        return self._with(sizes, turned.T, weight * len(moment) / float(np.trace(moment)))

    def _with(self, sizes: Array, axes: Array, weight: float) -> Metric:
        kept = sizes > np.finfo(np.float64).eps * axes.shape[1] * sizes.max()
        return replace(self, axes=axes[kept], shares=1 / (1 + weight * sizes[kept]))

    def freed(self, rows: Array, *, power: float = 1.0) -> Array:
        """X M^-power (n, d). What is held is taken away twice, which makes it exact to rounding."""
        for _ in range(2 if len(self.held) else 0):
            rows = rows - rows @ self.held.T @ self.held
        return rows - (rows @ self.axes.T * (1 - self.shares**power)) @ self.axes if len(self.axes) else rows

    def check(self, rows: Array, left: Array) -> None:
        """See that anchors leave something of the rows.

        Raises:
            DataError: they do not.
        """
        if len(self.held) and np.linalg.norm(left) <= ANCHORED * np.linalg.norm(rows):
            raise DataError(
                f"--anchor: {self.num_anchors} rows span all inputs ({len(self.held)} dimensions of {rows.shape[1]}): no input is"
                " left to tune",
                hint="--anchor-weight 100 lets their outputs change a little; or give fewer anchor rows",
            )


# --- the covariance file ---------------------------------------------------------------------------------------------


def write_covariance(path: Path, rows: Path, layer: Weight, *, overwrite: bool) -> int:
    """Write the covariance of the inputs x of a layer, which are read some MiB at a time; returns the file's size.

    Raises:
        DataError: x does not fit the layer.
        OutputError: something is there already.
    """
    x = open_rows(rows, ("x",))["x"]
    check_matrix(x)
    check_width(x, layer)
    _check_size(layer)
    moment, total, start = np.zeros((x.shape[1], x.shape[1])), np.zeros(x.shape[1]), 0

    def check_place(place: Path) -> None:
        if not overwrite:
            refuse_existing(place, hint="--overwrite replaces it")
        if not place.is_file() or read_safetensors(place).metadata.get("format") != FORMAT:
            raise OutputError(f"{place}: exists already, and is no covariance", hint="choose another place")

    with staged(path, check=check_place, option="--covariance-out") as hidden:
        for block in x.blocks():
            check_finite(x, block, start)
            values = block.astype(np.float64)
            moment += values.T @ values
            total += values.sum(axis=0)
            start += len(block)
        arrays = {"moment": moment / start, "mean": total / start}
        about = {"format": FORMAT, "rows": str(start), "layer": layer.name}
        with open_new(hidden, like=rows) as file:
            write_arrays(file, arrays, about)
        return hidden.stat().st_size


def read_covariance(path: Path, layer: Weight) -> Array:
    """The mean (d, d) of x x^T, x with its last 1 where the layer has a bias.

    Raises:
        DataError: it does not fit the layer, or is no covariance.
    """
    _check_size(layer)
    found = open_rows(path, ("moment",), optional=("mean",))
    width = layer.num_inputs
    expected = {"moment": (width, width), "mean": (width,)}
    for name, array in found.items():
        if array.shape != expected[name] or array.dtype.kind != "f":
            raise DataError(
                f"{path}: {name}: expected numbers of shape {list(expected[name])}, for {width} inputs of {layer.name}, found"
                f" {array.dtype} of shape {list(array.shape)}",
                hint="farcast tune CKPT --layer KEY --data FILE --covariance-out FILE writes one",
            )
    moment = read_whole(found["moment"])
    if layer.bias:
        if "mean" not in found:
            raise DataError(f"{path}: no array 'mean': expected the mean of x, since {layer.name} has a bias")
        mean = read_whole(found["mean"])
        moment = np.block([[moment, mean], [mean.T, np.ones((1, 1))]])
    sizes = np.linalg.eigvalsh(moment)
    if not np.allclose(moment, moment.T, rtol=0, atol=NEGATIVE * sizes[-1]) or sizes[0] < -NEGATIVE * sizes[-1]:
        raise DataError(f"{path}: moment: expected the mean of x x^T, found a matrix that no rows have")
    return moment


def _check_size(layer: Weight) -> None:
    if layer.num_inputs > MAX_WIDTH:
        raise DataError(
            f"{layer.name}: a covariance of {layer.num_inputs} inputs: expected at most {MAX_WIDTH}",
            hint="--anchor FILE keeps the outputs of some rows",
        )
