"""Gram matrices on a device: many small tensors' at once, as one batched product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.engine.casts import Floats

BATCH_BYTES = 64 << 20  # of float64, which the host and the device hold at once


def products_of(bases: Sequence[Floats], device: str) -> NDArray[np.float64]:
    """Inner products of each basis' rows, (B, R, R), from bases (R, N); their N may differ.

    One product (B, R, N) x (B, N, R): shorter ones are filled up with zeros, which add nothing.
    """
    batch = np.zeros((len(bases), bases[0].shape[0], max(basis.shape[1] for basis in bases)))
    for row, basis in zip(batch, bases, strict=True):
        row[:, : basis.shape[1]] = basis
    stacked = torch.from_numpy(batch).to(device)
    return np.asarray(torch.bmm(stacked, stacked.transpose(1, 2)).cpu().numpy())
