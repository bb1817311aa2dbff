"""Numbers are widened and rounded to the bits that torch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farcast_cli.engine.casts import are_finite_halves, has_negative_zeros, narrow, narrow_pairs, unpaired, widen, widen_pairs
from farcast_cli.tensors import DTYPES

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_number_of_two_bytes_is_widened_as_torch_does(name: str, work: type[np.float32 | np.float64]) -> None:
    expected = torch.from_numpy(EVERY_HALF.copy()).view(getattr(torch, name)).to(torch.from_numpy(np.empty(0, work)).dtype)
    found = widen(EVERY_HALF.view(np.uint8), DTYPES[name], np.empty(len(EVERY_HALF), work))
    np.testing.assert_array_equal(found, expected.numpy())
    for few in (EVERY_HALF[: 1 << 15], EVERY_HALF[1 << 15 :]):  # float16 in numpy, where torch is not worth its import
        found = widen(few.view(np.uint8), DTYPES[name], np.empty(len(few), work))
        np.testing.assert_array_equal(found, expected.numpy()[few])


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
    with np.errstate(all="ignore"):
        narrow(values, DTYPES[name], found, np.empty(len(values), np.uint32), may_be_nan=False)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_what_is_no_number_stays_none(name: str) -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 1.0], np.float32)
    raw = np.empty(len(values) * DTYPES[name].itemsize, np.uint8)
    narrow(values, DTYPES[name], raw, np.empty(len(values), np.uint32), may_be_nan=True)
    found = widen(raw, DTYPES[name], np.empty(len(values), np.float32))
    np.testing.assert_array_equal(found, values)


def test_pairs_are_widened_and_rounded_to_the_same_bits() -> None:
    """Every number of two bytes, NaN and infinity too, comes back as it was; others are rounded as one by one."""
    bfloat16, random = DTYPES["bfloat16"], np.random.default_rng(0)
    halves = random.permutation(EVERY_HALF)
    raw, count = halves.view(np.uint8), len(halves)
    paired = widen_pairs(raw, np.empty(count, np.float32))
    np.testing.assert_array_equal(
        unpaired(paired).view(np.uint32), widen(raw, bfloat16, np.empty(count, np.float32)).view(np.uint32)
    )
    back = np.empty(2 * count, np.uint8)
    narrow_pairs(paired, back, np.empty(count, np.uint32))
    np.testing.assert_array_equal(back, raw)

    values = (random.integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(1))
    expected, found = np.empty(2 * len(values), np.uint8), np.empty(2 * len(values), np.uint8)
    narrow(unpaired(values), bfloat16, expected, np.empty(len(values), np.uint32), may_be_nan=False)
    narrow_pairs(values, found, np.empty(len(values), np.uint32))
    np.testing.assert_array_equal(found, expected)


def test_each_half_that_is_not_finite_is_noticed() -> None:
    finite = np.isfinite((EVERY_HALF.astype(np.uint32) << 16).view(np.float32))
    assert are_finite_halves(EVERY_HALF[finite].view(np.uint8))
    for bad in EVERY_HALF[~finite][::7]:
        assert not are_finite_halves(np.array([0x3F80, bad, 0xBF80], np.uint16).view(np.uint8))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
def test_a_negative_zero_is_noticed(name: str) -> None:
    dtype = DTYPES[name]
    values = torch.tensor([-1.0, 0.0, 5.0, -0.0], dtype=getattr(torch, name))
    assert has_negative_zeros(values.view(torch.uint8).numpy(), dtype)
    assert not has_negative_zeros(values[:3].view(torch.uint8).numpy(), dtype)
