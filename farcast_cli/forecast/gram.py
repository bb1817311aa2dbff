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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli import workers
from farcast_cli.stream import Reader, Resources, Scratch, Stretch, read_trajectory, sample_stretches, stretches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.alignment import Alignment
    from farcast_cli.layouts.base import Snapshot

DEFAULT_SAMPLE = 16_384  # elements per tensor; 10,000 agree with the full pass within .001 of the ratio
KEPT_SAMPLE = 1_024  # of those, kept for the fits that are not least squares; within .005 of a full fit
KEPT_BYTES = 64 << 20  # for all kept samples together
MIN_KEPT = 64
FORK_BYTES = 16 << 20  # to be read, from which on processes pay for their start


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
    resources: Resources | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Gram, Sample]:
    """Read a sample (or, with None, all) of every tensor at every snapshot and sum up its inner products.

    One pass over what it reads, in parallel, in stretches of tensors; sums are taken in order, so that the result does not
    depend on the number of workers. Peak memory: a stretch at all snapshots for each worker, and the result.

    Raises:
        NonFiniteError: NaN or infinity in what was read.
    """
    num_snapshots, num_tensors = len(steps), len(alignment.tensors)
    reading = _Reading(
        alignment, tuple(_tasks(alignment, num_samples)), resources or Resources(), _num_kept(num_snapshots, num_tensors)
    )
    products = np.zeros((num_tensors, num_snapshots + 1, num_snapshots + 1))
    seen = np.zeros(num_tensors)
    kept: list[NDArray[np.float32]] = []
    for task, part in zip(reading.tasks, workers.in_order(_parts(reading)), strict=True):
        if part.products is not None:
            products[task.index] += part.products
            seen[task.index] += task.count
            progress(part.num_bytes)
        if part.kept is not None:
            kept.append(part.kept)
    sizes = np.array([tensor.num_elements for tensor in alignment.tensors], dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum([len(rows) for rows in kept])]).astype(np.int64)
    values = np.concatenate(kept) if kept else np.empty((0, num_snapshots), np.float32)
    products *= (sizes / seen)[:, None, None]
    return Gram(np.array(steps, dtype=np.int64), products), Sample(values, bounds, sizes)


def _num_kept(num_snapshots: int, num_tensors: int) -> int:
    return min(KEPT_SAMPLE, max(MIN_KEPT, KEPT_BYTES // (4 * num_snapshots * num_tensors)))


@dataclass(frozen=True, slots=True)
class _Task:
    """Stretches of tensor `index`, to be summed up, kept a few of, or both."""

    index: int
    pieces: tuple[Stretch, ...]
    is_summed: bool
    is_kept: bool

    @property
    def count(self) -> int:
        return sum(piece.count for piece in self.pieces)


def _tasks(alignment: Alignment, num_samples: int | None) -> Iterator[_Task]:
    for index, tensor in enumerate(alignment.tensors):
        sample = tuple(sample_stretches(tensor.num_elements, num_samples or KEPT_SAMPLE))
        yield _Task(index, sample, is_summed=num_samples is not None, is_kept=True)
        if num_samples is None:
            for piece in stretches(tensor.num_elements, num_snapshots=len(tensor.entries), itemsize=8):
                yield _Task(index, (piece,), is_summed=True, is_kept=False)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is read, and how."""

    alignment: Alignment
    tasks: tuple[_Task, ...]
    resources: Resources
    num_kept: int

    @property
    def num_bytes(self) -> int:
        return sum(task.count * self.itemsize(task) for task in self.tasks)

    def itemsize(self, task: _Task) -> int:
        """Bytes of an element at all its snapshots."""
        return sum(entry.dtype.itemsize for entry in self.alignment.tensors[task.index].entries)


@dataclass(slots=True)
class Part:
    """What came of a task: the products (R, R) of its values, or the basis (R, N) for a device to multiply."""

    number: int
    num_bytes: int
    products: NDArray[np.float64] | None = None
    basis: NDArray[np.float64] | None = None
    kept: NDArray[np.float32] | None = None


class _Summer:
    """Reads tasks; belongs to one worker."""

    def __init__(self, reading: _Reading, *, multiplies: bool) -> None:
        self._reading, self._multiplies = reading, multiplies
        self._reader, self._scratch = Reader(reading.resources.io), Scratch()

    def fill(self, number: int) -> Part:
        task = self._reading.tasks[number]
        entries = self._reading.alignment.tensors[task.index].entries
        basis = self._memory(len(entries) + 1, task.count)
        values = read_trajectory(self._reader, entries, task.pieces, basis[:-1])
        self._reader.release()
        part = Part(number, task.count * self._reading.itemsize(task))
        if task.is_kept:
            part.kept = _thin(values, self._reading.num_kept)
        if task.is_summed:
            to_basis(basis)
            if self._multiplies:
                part.products = in_basis_order(basis @ basis.T)
            else:
                part.basis = basis
        return part

    def _memory(self, num_rows: int, count: int) -> NDArray[np.float64]:
        if not self._multiplies:
            return np.empty((num_rows, count))  # handed on
        return self._scratch.named("basis", num_rows * count, np.float64).reshape(num_rows, count)

    def close(self) -> None:
        """Nothing to do: the reader's files close with it."""


def _parts(reading: _Reading) -> Iterator[Part]:
    num_tasks, device, num_workers = len(reading.tasks), reading.resources.device, reading.resources.num_workers
    if device != "cpu":
        make = partial(_Summer, reading, multiplies=False)
        return _multiplied(workers.in_threads(num_tasks, make, max(num_workers, 2)), device)
    make = partial(_Summer, reading, multiplies=True)
    return workers.on_cores(num_tasks, make, num_workers if reading.num_bytes >= FORK_BYTES else 1)


def _multiplied(parts: Iterator[Part], device: str) -> Iterator[Part]:
    """The parts with their products in place of their bases, made on a device, as many at once as it may hold."""
    from farcast_cli.forecast.device_gram import BATCH_BYTES, products_of

    held: list[Part] = []
    bases: list[NDArray[np.float64]] = []

    def flush() -> Iterator[Part]:
        for part, products in zip(held, products_of(bases, device) if held else (), strict=True):
            part.products = in_basis_order(products)
            yield part
        held.clear()
        bases.clear()

    for part in parts:
        if part.basis is None:
            yield part
            continue
        if (len(held) + 1) * max(part.basis.nbytes, *(basis.nbytes for basis in bases), 0) > BATCH_BYTES:
            yield from flush()
        held.append(part)
        bases.append(part.basis)
        part.basis = None
    yield from flush()


def to_basis(values: NDArray[np.float64]) -> None:
    """Turn rows w_0 .. w_{T-1} and one to spare into w_0, d_1 .. d_{T-1} and ones, in place."""
    for after in range(len(values) - 2, 0, -1):
        values[after] -= values[after - 1]
    values[-1] = 1.0


def in_basis_order(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Products of w_0, d_1 .., 1 as those of d_1 .., w_0, 1; the last two axes."""
    order = [*range(1, products.shape[-1] - 1), 0, products.shape[-1] - 1]
    return products[..., order, :][..., order]


def _thin(values: NDArray[np.float64], num_kept: int) -> NDArray[np.float32]:
    """At most `num_kept` of N elements, evenly spread: (M, T)."""
    count = values.shape[1]
    chosen = np.linspace(0, count - 1, min(count, num_kept)).round().astype(np.int64)
    return np.ascontiguousarray(values[:, chosen].T.astype(np.float32))


def bytes_to_sample(snapshots: Sequence[Snapshot], num_samples: int | None) -> int:
    """What `accumulate` will read at most: a sample (or, with None, all) of every tensor at every snapshot."""
    entries = [entry for snapshot in snapshots for entry in snapshot.tensors.values()]
    return sum(min(e.num_elements, num_samples or e.num_elements) * e.dtype.itemsize for e in entries)
