"""Numbers are widened and rounded to the bits that torch gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from farcast_cli.engine.casts import MAX_FINITE, are_finite, has_negative_zeros, narrow, widen
from farcast_cli.tensors import DTYPES

if TYPE_CHECKING:
    from numpy.typing import NDArray

EVERY: dict[int, NDArray[Any]] = {1: np.arange(1 << 8, dtype=np.uint8), 2: np.arange(1 << 16, dtype=np.uint16)}
"""Every pattern of one byte and of two."""
NARROW = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
EVERY_HALF = EVERY[2]


def every(name: str) -> NDArray[np.uint8]:
    return np.asarray(EVERY[DTYPES[name].itemsize].view(np.uint8))


def by_torch(raw: NDArray[np.uint8], name: str) -> torch.Tensor:
    return torch.from_numpy(raw.copy()).view(getattr(torch, name))


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("name", NARROW)
def test_every_number_of_one_byte_or_two_is_widened_as_torch_does(name: str, work: type[np.float32 | np.float64]) -> None:
    expected = by_torch(every(name), name).to(torch.from_numpy(np.empty(0, work)).dtype).numpy()
    middle = len(expected) // 2  # float16 in numpy, where torch is not worth its import
    for part in (slice(None), slice(0, middle), slice(middle, None)):
        few = EVERY[DTYPES[name].itemsize][part]
        found = widen(few.view(np.uint8), DTYPES[name], np.empty(len(few), work))
        np.testing.assert_array_equal(found, expected[part])


def test_numbers_at_odd_bytes_are_widened_and_rounded_too() -> None:
    """As in a file that is read in place."""
    for name in NARROW:
        odd = np.concatenate([np.zeros(1, np.uint8), every(name)])[1:]
        count = len(odd) // DTYPES[name].itemsize
        expected = widen(every(name), DTYPES[name], np.empty(count, np.float32))
        found = widen(odd, DTYPES[name], np.empty(count, np.float32))
        np.testing.assert_array_equal(found, expected)
        is_number = ~np.isnan(expected)
        back = np.zeros(1 + int(is_number.sum()) * DTYPES[name].itemsize, np.uint8)[1:]
        narrow(expected[is_number], DTYPES[name], back)
        np.testing.assert_array_equal(back, every(name).reshape(count, -1)[is_number].ravel())


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_numbers_are_rounded_as_torch_does(name: str, work: type[np.float32 | np.float64]) -> None:
    """Halfway between neighbours, just beside it, at both ends of the range, and anywhere."""
    random = np.random.default_rng(0)
    anything = random.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    upper = EVERY_HALF.astype(np.uint32) << 16
    around = np.concatenate([upper + low for low in (0x7FFF, 0x8000, 0x8001, 0xFFFF, 0)]).astype(np.uint32).view(np.float32)
    single = np.concatenate([anything, around])
    values = single[np.isfinite(single)].astype(work)
    if name == "float32":
        values = values[np.abs(values) <= np.finfo(np.float32).max]
    expected = torch.from_numpy(values).to(getattr(torch, name)).view(torch.uint8).numpy()
    found = np.empty(len(values) * DTYPES[name].itemsize, np.uint8)
    is_finite = narrow(values, DTYPES[name], found)
    np.testing.assert_array_equal(found, expected)
    assert is_finite == bool(by_torch(found, name).isfinite().all())


@pytest.mark.parametrize("name", ["float64", "float32", *NARROW])
def test_what_is_no_number_stays_none_and_is_told(name: str) -> None:
    dtype = DTYPES[name]
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 1.0], np.float32)
    raw = np.empty(len(values) * dtype.itemsize, np.uint8)
    assert not narrow(values, dtype, raw)
    found = widen(raw, dtype, np.empty(len(values), np.float32))
    lost = np.float32(np.nan) if name == "float8_e4m3fn" else np.float32(np.inf)  # a type without infinity
    np.testing.assert_array_equal(found, np.where(np.isinf(values), np.copysign(lost, values), values))
    assert narrow(values[-1:], dtype, raw[: dtype.itemsize])


@pytest.mark.parametrize("name", ["float64", "float32", *NARROW])
def test_a_number_that_rounding_takes_out_of_the_range_is_told(name: str) -> None:
    dtype, raw = DTYPES[name], np.empty(DTYPES[name].itemsize, np.uint8)
    work = np.float64 if name == "float64" else np.float32
    for sign in (1, -1):
        assert narrow(np.array([sign * MAX_FINITE[name]], work), dtype, raw)
        assert float(widen(raw, dtype, np.empty(1, work))[0]) == sign * MAX_FINITE[name]
    if name not in {"float64", "float32"}:
        assert not narrow(np.array([1.1 * MAX_FINITE[name]], np.float64), dtype, raw)


@pytest.mark.parametrize("name", NARROW)
def test_each_number_of_one_byte_or_two_that_is_not_finite_is_noticed(name: str) -> None:
    dtype, patterns = DTYPES[name], EVERY[DTYPES[name].itemsize]
    finite = by_torch(every(name), name).float().isfinite().numpy()
    assert are_finite(patterns[finite].view(np.uint8), dtype)
    assert are_finite(patterns[:0].view(np.uint8), dtype)
    one, two = patterns[finite][[1, -1]]
    for bad in patterns[~finite]:
        assert not are_finite(np.array([one, bad, two]).view(np.uint8), dtype)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_a_negative_zero_is_noticed(name: str) -> None:
    dtype = DTYPES[name]
    values = torch.tensor([-1.0, 0.0, 5.0, -0.0], dtype=getattr(torch, name))
    assert has_negative_zeros(values.view(torch.uint8).numpy(), dtype)
    assert not has_negative_zeros(values[:3].view(torch.uint8).numpy(), dtype)
