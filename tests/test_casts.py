"""Numbers are widened and rounded to the bits that torch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farcast_cli.casts import narrow, widen
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
