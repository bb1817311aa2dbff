"""The low-rank factors of a tuning: what they make of a stretch of the weights, and the file that holds them alone.

    W = c W_0 + U^T D

A delta file is a safetensors file with, for layer i, `i.factors` (r, m_out), `i.directions` (r, m_in, one more with a
bias) in float32 and `i.scale` in float64. Its metadata say for which weights it was made, how, and the SHA-256 of all its
values.

Shapes: r directions, N elements of a stretch.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.errors import FileFormatError, HalfWrittenError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.place import open_new
from farcast_cli.formats.safetensors_file import read_safetensors, write_arrays
from farcast_cli.tune.numbers import round_stochastically
from farcast_cli.tune.weight import read_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.checkpoint.pieces import ValueMap
    from farcast_cli.choices import Rounding
    from farcast_cli.tensors import DType, TensorEntry
    from farcast_cli.tune.weight import Weight

    Array = NDArray[np.float64]

FORMAT = "farcast tune 1"
TOLERANCE = 1e-4  # of the norm of a change: what fewer directions may leave of it
GROUP_ELEMENTS = 1 << 17
"""Rows are always multiplied in the same groups of about so many elements, however a tensor is split: a sum's rounding
may depend on how many rows a product has."""


@dataclass(frozen=True, slots=True)
class Delta:
    """One layer's change: c, U (r, m_out) and D (r, m_in, and one more where there is a bias)."""

    layer: str
    bias: str | None
    scale: float
    factors: Array
    directions: Array
    checksum: int
    """Of the bytes of W_0, which it was made for."""
    is_transposed: bool = False

    def applied(self, base: Array, overlap: Array) -> Array:
        """Z (n, m_out) of rows from their Z_0 and their inner products with D (n, r)."""
        return self.scale * base + overlap @ self.factors

    @property
    def size(self) -> float:
        """|U^T D|."""
        return math.sqrt(max(float(np.vdot(self.directions @ self.directions.T, self.factors @ self.factors.T)), 0.0))


def multiplied(matrix: Array, columns: Array) -> Array:
    """M C in the memory of C, some columns at a time; M (s, r) with s <= r."""
    width = max(1, GROUP_ELEMENTS // max(1, len(columns)))
    for start in range(0, columns.shape[1], width):
        part = slice(start, start + width)
        columns[: len(matrix), part] = matrix @ columns[:, part]
    return columns[: len(matrix)]


def truncated(factors: Array, directions: Array | None) -> tuple[Array, Array]:
    """The same U^T D, up to `TOLERANCE`, by the fewest directions, which are orthonormal; in float32's numbers.

    Args:
        factors: (r, m_out); taken over.
        directions: (r, m_in); None where they are the axes.

    Returns:
        U (r', m_out) and D (r', m_in).
    """
    basis = None
    if directions is not None:
        basis, mixed = np.linalg.qr(directions.T)
        factors = multiplied(mixed, factors)
    squares, turn = np.linalg.eigh(factors @ factors.T)
    left = np.cumsum(np.maximum(squares, 0))
    turn = turn[:, left > TOLERANCE**2 * left[-1]][:, ::-1]
    kept = turn.T if basis is None else turn.T @ basis.T
    made = multiplied(turn.T, factors)
    for row in made:
        row[:] = row.astype(np.float32)
    return made, kept.astype(np.float32).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Rounded:
    """How values are put on the grid of the stored type."""

    how: Rounding = "nearest"
    seed: int = 0


def maps_of(delta: Delta, weight: Weight, rounded: Rounded) -> dict[str, ValueMap]:
    """What becomes of each tensor of a layer, by its name: the shards of the weight, and of the bias."""
    width = weight.num_inputs
    made: dict[str, ValueMap] = {}
    left, right = delta.factors, delta.directions[:, :width]
    if weight.is_transposed:
        left, right = right, left
    for number, shard in enumerate(weight.shards):
        rows = left[:, shard.first : shard.first + shard.num_rows]
        made[shard.entry.name] = _Map(delta.scale, rows, right, shard.entry.dtype, rounded, number)
    for number, shard in enumerate(weight.bias):
        rows = delta.factors[:, shard.first : shard.first + shard.num_rows]
        made[shard.entry.name] = _Map(delta.scale, rows, delta.directions[:, width:], shard.entry.dtype, rounded, -1 - number)
    return made


@dataclass(frozen=True, slots=True)
class _Map:
    """c w + (U^T D) at the place of each value, rounded as asked; the same for every split into stretches."""

    scale: float
    factors: Array
    directions: Array
    dtype: DType
    rounded: Rounded
    number: int
    """Of the tensor, so that two of them do not draw the same numbers."""

    def __call__(self, values: NDArray[np.floating[Any]], start: int) -> NDArray[np.floating[Any]]:
        changed = self.scale * values.astype(np.float64)
        changed += self._change(start, len(values))
        if self.rounded.how == "stochastic":
            changed = round_stochastically(changed, self.dtype, seed=self._seed, start=start)
        return changed if self.dtype.name == "float64" else changed.astype(np.float32)

    @property
    def _seed(self) -> int:
        return (self.rounded.seed * 0x9E3779B9 + self.number) % (1 << 64)

    def _change(self, start: int, count: int) -> Array:
        """Elements [start, start + count) of U^T D, row by row."""
        width = self.directions.shape[1]
        per_group = max(1, GROUP_ELEMENTS // width)
        group_elements = per_group * width
        out = np.empty(count)
        for group in range(start // group_elements, (start + count - 1) // group_elements + 1):
            begin = group * group_elements
            whole = (self.factors[:, group * per_group : (group + 1) * per_group].T @ self.directions).reshape(-1)
            low, high = max(start, begin), min(start + count, begin + whole.size)
            out[low - start : high - start] = whole[low - begin : high - begin]
        return out


# --- the file --------------------------------------------------------------------------------------------------------


def write_deltas(path: Path, deltas: Sequence[Delta], about: str, *, like: Path) -> None:
    """Write a delta file; `about`, its record, goes into its metadata. `like` is the checkpoint that it belongs to."""
    arrays = _arrays(deltas)
    layers = [{"layer": d.layer, "bias": d.bias, "checksum": d.checksum, "transposed": d.is_transposed} for d in deltas]
    metadata = {"format": FORMAT, "layers": json.dumps(layers), "about": about, "sha256": _digest(arrays)}
    with open_new(path, like=like) as file:
        write_arrays(file, arrays, metadata)


def read_deltas(path: Path) -> list[Delta]:
    """The deltas of a file.

    Raises:
        FileFormatError: no delta file, or a damaged one.
    """
    found = read_safetensors(path)
    if found.metadata.get("format") != FORMAT:
        raise FileFormatError(f"{path}: not a delta file", hint="--apply takes what farcast tune --delta-out wrote")
    entries = {entry.name: entry for entry in found.entries}
    try:
        layers = parse_json(found.metadata["layers"].encode())
        deltas = [_delta(path, number, one, entries) for number, one in enumerate(layers)]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    digest = _digest(_arrays(deltas))
    if found.metadata.get("sha256", digest) != digest:  # an earlier version wrote none
        raise _damaged(path, "its values are not those that were written")
    return deltas


def _damaged(path: Path, why: str) -> HalfWrittenError:
    return HalfWrittenError(f"{path}: a damaged delta file: {why}", hint="write it again with --delta-out")


def read_about(path: Path) -> str:
    """The record of a delta file whose values are seen to be those that were written.

    Raises:
        FileFormatError: no delta file, or a damaged one.
    """
    read_deltas(path)
    return read_safetensors(path).metadata.get("about", "")


def _arrays(deltas: Sequence[Delta]) -> dict[str, Any]:
    """What a delta file holds, by name."""
    arrays: dict[str, Any] = {}
    for number, delta in enumerate(deltas):
        arrays[f"{number}.directions"] = np.ascontiguousarray(delta.directions, np.float32)
        arrays[f"{number}.factors"] = np.ascontiguousarray(delta.factors, np.float32)
        arrays[f"{number}.scale"] = np.array([delta.scale])
    return arrays


def _digest(arrays: Mapping[str, Any]) -> str:
    whole = hashlib.sha256()
    for array in arrays.values():
        whole.update(array.data)
    return whole.hexdigest()


def _delta(path: Path, number: int, about: Any, entries: dict[str, TensorEntry]) -> Delta:
    directions, factors, scale = (_array(entries[f"{number}.{name}"]) for name in ("directions", "factors", "scale"))
    layer, bias, checksum = about["layer"], about["bias"], about["checksum"]
    is_sound = directions.ndim == factors.ndim == 2 and len(directions) == len(factors) and scale.shape == (1,)  # noqa: PLR2004
    if not (is_sound and isinstance(layer, str) and isinstance(bias, str | None) and isinstance(checksum, int)):
        raise ValueError(f"layer {number} is described wrongly")
    if not all(np.isfinite(values).all() for values in (directions, factors, scale)):
        raise FileFormatError(f"{path}: holds NaN or infinity", hint="write it again with --delta-out")
    return Delta(layer, bias, float(scale[0]), factors, directions, checksum, about.get("transposed", False) is True)


def _array(entry: TensorEntry) -> Array:
    if entry.dtype.name not in {"float32", "float64"}:
        raise ValueError(f"{entry.name} is {entry.dtype.name}")
    return read_tensor(entry)[0].reshape(entry.shape).astype(np.float64)
