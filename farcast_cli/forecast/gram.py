"""The statistic that stands for a trajectory: inner products of its increments, per tensor.

For a tensor's snapshots w_0 .. w_{T-1} the basis is

    d_1 .. d_{T-1}   increments, d_t = w_t - w_{t-1}
    w_0              the first snapshot
    1                the constant

and the matrix holds every inner product of two of its R = T + 1 vectors, in float64. Every forecast that is linear in
the snapshots is a vector of R coefficients; its norm, its least-squares fit and its error at any origin and lead are
algebra on this matrix. Increments rather than weights: inner products of raw weights cancel (errors up to 2e-3).

Shapes: K tensors, T snapshots, R = T + 1 basis vectors, N elements, M sampled elements.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from farcast_cli.stream import Reader, Stretch, read_trajectory, sample_stretches, stretches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.alignment import AlignedTensor, Alignment
    from farcast_cli.layouts.base import Snapshot

DEFAULT_SAMPLE = 16_384  # elements per tensor; 10,000 agree with the full pass within .001 of the ratio
KEPT_SAMPLE = 1_024  # of those, kept for the fits that are not least squares; within .005 of a full fit
KEPT_BYTES = 64 << 20  # for all kept samples together
MIN_KEPT = 64


@dataclass(frozen=True, slots=True)
class Gram:
    """Inner products of a trajectory's basis vectors. `matrix` is (K, R, R), `steps` (T,) in optimiser steps.

    Each tensor's matrix is scaled from its sample to all its elements, so that sums over tensors weigh them by size.
    """

    steps: NDArray[np.int64]
    matrix: NDArray[np.float64]

    @property
    def num_snapshots(self) -> int:
        return len(self.steps)

    def norms(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """|| sum_r c_r b_r || per tensor, (K,), for coefficients (K, R) or (R,)."""
        each = np.broadcast_to(coefficients, self.matrix.shape[:2])
        squared = np.einsum("kr,kr->k", each, np.einsum("krs,ks->kr", self.matrix, each))
        return np.asarray(np.sqrt(np.maximum(squared, 0.0)))

    def total_norm(self, coefficients: NDArray[np.float64]) -> float:
        """The norm over all tensors together."""
        return float(np.linalg.norm(self.norms(coefficients)))

    def select(self, tensors: NDArray[np.bool_]) -> Gram:
        """The statistic of some of the tensors, by a mask (K,)."""
        return Gram(self.steps, self.matrix[tensors])

    def restrict(self, keep: Sequence[int]) -> Gram:
        """The statistic of a subset of the snapshots, given by their indices in ascending order."""
        change = self.change_of_basis(keep)
        return Gram(self.steps[list(keep)], change @ self.matrix @ change.T)

    def change_of_basis(self, keep: Sequence[int]) -> NDArray[np.float64]:
        """The subset's basis vectors in terms of these, (R', R): a step c' over the subset is c' @ this here."""
        change = np.zeros((len(keep) + 1, self.num_snapshots + 1))
        for row, (before, after) in enumerate(itertools.pairwise(keep)):
            change[row, before:after] = 1.0  # increments add up
        change[len(keep) - 1, : keep[0]] = 1.0  # the new first snapshot: the old one and the increments up to it
        change[len(keep) - 1, -2] = 1.0
        change[len(keep), -1] = 1.0
        return change


@dataclass(frozen=True, slots=True)
class Sample:
    """Sampled weights of all tensors: `values` (M, T) float32, `bounds` (K + 1,) rows of each, `sizes` (K,) elements."""

    values: NDArray[np.float32]
    bounds: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def select(self, tensors: NDArray[np.bool_]) -> Sample:
        """The sample of some of the tensors, by a mask (K,)."""
        counts = np.diff(self.bounds)
        bounds = np.concatenate([[0], np.cumsum(counts[tensors])])
        return Sample(self.values[np.repeat(tensors, counts)], bounds, self.sizes[tensors])

    def restrict(self, keep: Sequence[int]) -> Sample:
        return Sample(self.values[:, list(keep)], self.bounds, self.sizes)


def accumulate(
    alignment: Alignment,
    steps: Sequence[int],
    *,
    num_samples: int | None = DEFAULT_SAMPLE,
    device: torch.device | None = None,
    num_threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Gram, Sample]:
    """Read a sample (or, with None, all) of every tensor at every snapshot and sum up its inner products.

    One pass over what it reads, tensors in parallel. Peak memory: a stretch at all snapshots per thread, and the
    result, which does not depend on the number of threads.

    Raises:
        NonFiniteError: NaN or infinity in what was read.
    """
    reader, where = Reader(), device or torch.device("cpu")
    num_snapshots, num_tensors = len(steps), len(alignment.tensors)
    matrix = np.empty((num_tensors, num_snapshots + 1, num_snapshots + 1))
    num_kept = int(min(KEPT_SAMPLE, max(MIN_KEPT, KEPT_BYTES // (4 * num_snapshots * num_tensors))))
    one = partial(_one_tensor, reader, num_samples=num_samples, num_kept=num_kept, device=where, progress=progress)
    kept: list[NDArray[np.float32]] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for index, (products, sample) in enumerate(pool.map(one, alignment.tensors)):
            matrix[index] = products
            kept.append(sample)
    bounds = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])]).astype(np.int64)
    sizes = np.array([tensor.num_elements for tensor in alignment.tensors], dtype=np.int64)
    values = np.concatenate(kept) if kept else np.empty((0, num_snapshots), np.float32)
    return Gram(np.array(steps, dtype=np.int64), matrix), Sample(values, bounds, sizes)


def _one_tensor(
    reader: Reader,
    tensor: AlignedTensor,
    *,
    num_samples: int | None,
    num_kept: int,
    device: torch.device,
    progress: Callable[[int], None],
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    num_snapshots = len(tensor.entries)
    total = torch.zeros(num_snapshots + 1, num_snapshots + 1, dtype=torch.float64, device=device)
    sample = sample_stretches(tensor.num_elements, num_samples or KEPT_SAMPLE)
    passes = [sample] if num_samples else [[piece] for piece in _all_of(tensor, num_snapshots)]
    sampled = read_trajectory(reader, tensor.entries, sample, torch.float64)
    kept, seen = _thin(sampled, num_kept), 0
    for pieces in passes:
        values = sampled if pieces is sample else read_trajectory(reader, tensor.entries, pieces, torch.float64)
        total += basis_products(values.to(device))
        seen += values.shape[1]
        progress(sum(entry.dtype.itemsize for entry in tensor.entries) * values.shape[1])
    return total.cpu().numpy() * (tensor.num_elements / seen), kept


def _all_of(tensor: AlignedTensor, num_snapshots: int) -> Iterator[Stretch]:
    copies = 4  # raw, converted, basis and a difference, each of all snapshots
    return stretches(tensor.num_elements, num_snapshots=copies * num_snapshots, itemsize=8)


def basis_products(values: torch.Tensor) -> torch.Tensor:
    """Inner products (R, R) of the basis vectors of values (T, N)."""
    basis = torch.cat([values[1:] - values[:-1], values[:1], torch.ones_like(values[:1])])
    return basis @ basis.T


def _thin(values: torch.Tensor, num_kept: int) -> NDArray[np.float32]:
    """At most `num_kept` of N elements, evenly spread: (M, T)."""
    count = values.shape[1]
    chosen = torch.linspace(0, count - 1, min(count, num_kept)).round().long()
    return values[:, chosen].T.to(torch.float32).contiguous().numpy()


def bytes_to_sample(snapshots: Sequence[Snapshot], num_samples: int | None) -> int:
    """What `accumulate` will read at most: a sample (or, with None, all) of every tensor at every snapshot."""
    entries = [entry for snapshot in snapshots for entry in snapshot.tensors.values()]
    return sum(min(e.num_elements, num_samples or e.num_elements) * e.dtype.itemsize for e in entries)
