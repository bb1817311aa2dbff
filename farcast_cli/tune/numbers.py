"""Floating numbers as files hold them, and stochastic rounding to their types.

Stochastic rounding draws from a generator that counts: the number for an element is a hash of the seed and the element's
index, so that no split changes it.

Shapes: N numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.engine.casts import widen, work_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.tensors import DType


_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}
_LEAST_EXPONENT = {"float32": -126, "float16": -14, "bfloat16": -126}
"""Of a normal number; below it the grid stays as wide as it is there."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def decode(raw: bytes | memoryview | NDArray[np.uint8], dtype: DType) -> NDArray[Any]:
    """The numbers (N,) that bytes stand for: float64 for float64, float32 for all narrower types."""
    stored = np.frombuffer(raw, np.uint8)
    return widen(stored, dtype, np.empty(len(stored) // dtype.itemsize, work_type(dtype)))


def round_stochastically(values: NDArray[np.float64], dtype: DType, *, seed: int, start: int) -> NDArray[np.float64]:
    """Each number on one of its two neighbours of a type's grid, with the odds that keep its mean.

    A number on the grid already stays. float64 is returned as it is.

    Args:
        values: (N,).
        start: the index of the first in its tensor.

    Source: Croci, Fasi, Higham, Mary, Mikaitis, "Stochastic rounding: implementation, error analysis and
    applications" (2022), definition 1.
    """
    if dtype.name == "float64":
        return values
    _, exponent = np.frexp(values)
    unit = np.maximum(exponent - 1, _LEAST_EXPONENT[dtype.name]) - _MANTISSA[dtype.name]
    steps = np.ldexp(values, -unit)
    return np.asarray(np.ldexp(np.floor(steps + uniform(seed, start, len(values))), unit))


def uniform(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) for the elements [start, start + count) of a tensor, each by its index alone.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), SplitMix64.
    """
    state = np.arange(start + 1, start + count + 1, dtype=np.uint64) * _GOLDEN
    state += _mixed(np.array([seed], dtype=np.uint64) + _GOLDEN)
    return (_mixed(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
