"""Stored element types to and from the types of arithmetic, with the bits that torch's own casts give.

The only module that knows how numbers are rounded, and which bits are infinity and NaN. ml_dtypes teaches numpy bfloat16 and
float8. Importing torch takes two seconds and 200 MiB, more than most forecasts, so only float16 goes through it, on the same
memory, where it is rounded or comes in many values at once: numpy converts float16 one element at a time.

Shapes: N elements of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.tensors import DType

Floats = np.ndarray[tuple[Any, ...], np.dtype[np.floating[Any]]]
"""Values in a type of arithmetic."""
WorkType = type[np.float32] | type[np.float64]

_STORED: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16")},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_SIGN = {itemsize: 1 << (8 * itemsize - 1) for itemsize in _SIGNED}
"""The bits of -0.0."""
_LARGEST = {
    "float64": 0x7FEF_FFFF_FFFF_FFFF,
    "float32": 0x7F7F_FFFF,
    "float16": 0x7BFF,
    "bfloat16": 0x7F7F,
    "float8_e4m3fn": 0x7E,
    "float8_e5m2": 0x7B,
}
"""The bits of the largest finite number; those of infinity (float8_e4m3fn has none) and NaN follow."""
MAX_FINITE = {name: float(np.array(_LARGEST[name], f"u{of.itemsize}").view(of)) for name, of in _STORED.items()}
_TORCH_PAYS = 1 << 16  # float16 values at once: where so many come together, the import is soon made up for


def work_type(dtype: DType) -> WorkType:
    """The type in which values of a stored type are computed with."""
    return np.float64 if dtype.name == "float64" else np.float32


def bits_of(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.signedinteger[Any]]:
    """The elements (N,) of raw bytes as integers, to compare them bit by bit."""
    return raw.view(_SIGNED[dtype.itemsize])


def has_negative_zeros(raw: NDArray[np.uint8], dtype: DType) -> bool:
    return bool(np.minimum.reduce(bits_of(raw, dtype)) == -_SIGN[dtype.itemsize])


def are_finite(raw: NDArray[np.uint8], dtype: DType) -> bool:
    """Whether no element (N,) of raw bytes is NaN or infinity.

    Numbers of one sign are in the order of their bits, and what is not finite comes last. As signed integers the largest is
    a positive number, as unsigned ones a negative number.
    """
    largest, sign = _LARGEST[dtype.name], _SIGN[dtype.itemsize]
    greatest = np.maximum.reduce(raw.view(_SIGNED[dtype.itemsize]), initial=0)
    least = np.maximum.reduce(raw.view(_UNSIGNED[dtype.itemsize]), initial=0)
    return bool(greatest <= largest and least <= largest | sign)


def widen(raw: NDArray[np.uint8], dtype: DType, out: Floats) -> Floats:
    """The values of raw bytes in the type of `out` (N,); a view of the bytes where they are of that type already."""
    stored = raw.view(_STORED[dtype.name])
    if stored.dtype == out.dtype:
        return stored
    if dtype.name == "float16" and len(stored) >= _TORCH_PAYS:
        _convert_by_torch(stored, out)
    else:
        with np.errstate(all="ignore"):  # signalling NaN, which whoever reads looks for
            np.copyto(out, stored, casting="same_kind")
    return out


def narrow(values: Floats, dtype: DType, out: NDArray[np.uint8]) -> bool:
    """Round values (N,) to a stored type, to nearest even, into its bytes (N x itemsize); whether all results are finite."""
    stored = out.view(_STORED[dtype.name])
    if dtype.name == "float16":
        _convert_by_torch(values, stored)
    else:
        with np.errstate(all="ignore"):  # an overflow, which the result tells
            np.copyto(stored, values, casting="same_kind")
    return are_finite(out, dtype)


def _convert_by_torch(values: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]]) -> None:
    """Numpy takes 5 ns for an element of float16, torch .1; the bits are the same."""
    try:
        import torch
    except ImportError:
        with np.errstate(all="ignore"):  # signalling NaN and overflows, which the result tells
            np.copyto(out, values, casting="same_kind")
        return

    torch.set_num_threads(1)  # the caller is one of many workers
    own = values if values.flags.writeable else values.copy()  # torch warns of memory that it must not write to
    torch.from_numpy(out).copy_(torch.from_numpy(own))
