"""Stored element types to and from the types of arithmetic, in numpy, with the bits that torch's own casts give.

numpy knows no bfloat16 and converts float16 one element at a time, and importing torch takes two seconds and 200 MiB, more
than most forecasts. So bfloat16 is rounded by integer arithmetic here; only float16 goes through torch, on the same memory,
where it is rounded or comes in many values at once.

Shapes: N elements of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from farcast_cli.tensors import DType

Floats = np.ndarray[tuple[Any, ...], np.dtype[np.floating[Any]]]
"""Values in a type of arithmetic."""
WorkType = type[np.float32] | type[np.float64]

_CARRIERS = {"float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
"""What a stored type's bytes are viewed as; bfloat16 is the upper half of a float32."""
_BITS = {2: np.int16, 4: np.int32, 8: np.int64}
_LEAST = {itemsize: -(1 << (8 * itemsize - 1)) for itemsize in _BITS}
"""-0.0, as an integer."""
_TORCH_PAYS = 1 << 16  # float16 values at once: where so many come together, the import is soon made up for
_UPPER = np.uint32(16)
_UPPER_BITS = np.uint32(0xFFFF0000)
_ODD = np.uint32(1)
_HALF = np.uint32(0x7FFF)  # and one more where the last bit that stays is set: to nearest even
_INFINITY, _MINUS_INFINITY = 0x7F80, 0xFF80
_QUIET_NAN = np.uint16(0x7FC0)
MAX_FINITE = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
}


def work_type(dtype: DType) -> WorkType:
    """The type in which values of a stored type are computed with."""
    return np.float64 if dtype.name == "float64" else np.float32


def bits_of(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.signedinteger[Any]]:
    """The elements (N,) of raw bytes as integers, to compare them bit by bit."""
    return raw.view(_BITS[dtype.itemsize])


def has_negative_zeros(raw: NDArray[np.uint8], dtype: DType) -> bool:
    return bool(np.minimum.reduce(bits_of(raw, dtype)) == _LEAST[dtype.itemsize])


def are_finite_halves(raw: NDArray[np.uint8]) -> bool:
    """Whether all of some bfloat16s are finite: those of one sign are in the order of their bits, infinity and NaN last."""
    greatest, least = np.maximum.reduce(raw.view(np.int16)), np.maximum.reduce(raw.view(np.uint16))
    return bool(greatest < _INFINITY and least < _MINUS_INFINITY)


def widen(raw: NDArray[np.uint8], dtype: DType, out: Floats) -> Floats:
    """The values of raw bytes in the type of `out` (N,); a view of the bytes where they are of that type already."""
    stored = raw.view(_CARRIERS[dtype.name])
    if stored.dtype == out.dtype:
        return stored
    if dtype.name == "float16" and len(stored) >= _TORCH_PAYS:
        _convert_by_torch(stored, out)
    elif dtype.name != "bfloat16":
        np.copyto(out, stored, casting="same_kind")
    elif out.dtype == np.float32:
        _widen_halves(stored, out)
    else:
        single = np.empty(len(stored), np.float32)
        _widen_halves(stored, single)
        with np.errstate(invalid="ignore"):  # signalling NaN, which whoever reads looks for
            np.copyto(out, single)
    return out


def _widen_halves(upper: NDArray[np.uint16], out: Floats) -> None:
    bits = out.view(np.uint32)
    np.copyto(bits, upper)
    np.left_shift(bits, _UPPER, out=bits)


def narrow(values: Floats, dtype: DType, out: NDArray[np.uint8], scratch: NDArray[np.uint32], *, may_be_nan: bool) -> None:
    """Round values (N,) to a stored type, to nearest even, into its bytes (N x itemsize).

    Args:
        scratch: (N,), for the bits that decide.
        may_be_nan: look for NaN, which rounding by integers would turn into other numbers.
    """
    stored = out.view(_CARRIERS[dtype.name])
    if dtype.name == "float16":
        _convert_by_torch(values, stored)
    elif dtype.name != "bfloat16":
        np.copyto(stored, values, casting="same_kind")
    else:
        single = values if values.dtype == np.float32 else values.astype(np.float32)
        _narrow_to_halves(single, stored, scratch)
        if may_be_nan:
            stored[np.isnan(single)] = _QUIET_NAN


def _narrow_to_halves(values: Floats, out: NDArray[np.uint16], rest: NDArray[np.uint32]) -> None:
    _round_to_upper(values, rest)
    np.right_shift(rest, _UPPER, out=rest)
    np.copyto(out, rest, casting="unsafe")


def _round_to_upper(values: Floats, rest: NDArray[np.uint32]) -> None:
    """The bits of float32 values, their upper halves rounded: bits + 0x7fff + the last bit that stays."""
    bits = values.view(np.uint32)
    np.right_shift(bits, _UPPER, out=rest)
    np.bitwise_and(rest, _ODD, out=rest)
    np.add(rest, _HALF, out=rest)
    np.add(rest, bits, out=rest)


# --- bfloat16 by pairs: what lies at even places first, then what lies at odd ones; in half the time ------------------


def widen_pairs(raw: NDArray[np.uint8], out: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values of an even number of bfloat16s, by pairs."""
    pairs, bits = raw.view(np.uint32), out.view(np.uint32)
    np.left_shift(pairs, _UPPER, out=bits[: len(pairs)])
    np.bitwise_and(pairs, _UPPER_BITS, out=bits[len(pairs) :])
    return out


def narrow_pairs(values: NDArray[np.float32], out: NDArray[np.uint8], scratch: NDArray[np.uint32]) -> None:
    """Round values by pairs to bfloat16 in the order of a file; none of them is NaN but such as bfloat16 holds."""
    _round_to_upper(values, scratch)
    pairs = out.view(np.uint32)
    even, odd = scratch[: len(pairs)], scratch[len(pairs) :]
    np.right_shift(even, _UPPER, out=pairs)
    np.bitwise_and(odd, _UPPER_BITS, out=odd)
    np.bitwise_or(pairs, odd, out=pairs)


def unpaired(values: Floats) -> Floats:
    """Values by pairs, in the order of a file."""
    return values.reshape(2, -1).T.ravel()


def _convert_by_torch(values: NDArray[np.floating[Any]], out: NDArray[np.floating[Any]]) -> None:
    """Numpy takes 5 ns for an element of float16, torch .1."""
    import torch

    torch.set_num_threads(1)  # the caller is one of many workers
    source = values if values.flags.writeable else values.copy()  # torch warns of memory that it must not write to
    torch.from_numpy(out).copy_(torch.from_numpy(source))
