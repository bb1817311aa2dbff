"""One pass over a run's tensors that sums up their inner products, on a sample or on everything.

Knows what is read, in which order it is summed, and in which precision. A sample is summed in float64. A full pass over
millions of elements multiplies in float32, some thousand at a time, and adds up in float64; what float32 cannot hold is
read again in float64.

Shapes: K tensors, T snapshots, R = T + 1 basis vectors, N elements of a stretch, M sampled elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli import workers
from farcast_cli.casts import work_type
from farcast_cli.forecast.gram import Gram, Sample
from farcast_cli.forecast.products import are_held, in_basis_order, inner_products, to_basis
from farcast_cli.stream import (
    MAX_STRETCH,
    Reader,
    Resources,
    Scratch,
    Stretch,
    read_in_any_order,
    read_trajectory,
    sample_stretches,
    stretches,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.alignment import Alignment
    from farcast_cli.casts import Floats, WorkType
    from farcast_cli.layouts.base import Snapshot
    from farcast_cli.tensors import TensorEntry

DEFAULT_SAMPLE = 16_384  # elements per tensor; 10,000 agree with the full pass within .001 of the ratio
KEPT_SAMPLE = 1_024  # of those, kept for the fits that are not least squares; within .005 of a full fit
KEPT_BYTES = 64 << 20  # for all kept samples together
MIN_KEPT = 64
FORK_BYTES = 16 << 20  # to be read, from which on processes pay for their start
SPAN = 1 << 20  # elements of a tensor that a worker sums up before it says so
BLOCK = 1 << 17  # elements that it multiplies at once


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
    resources = resources or Resources()
    tasks = tuple(_tasks(alignment, num_samples, SPAN if resources.device == "cpu" else MAX_STRETCH))
    reading = _Reading(alignment, tasks, resources, _num_kept(num_snapshots, num_tensors))
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


def _tasks(alignment: Alignment, num_samples: int | None, span: int) -> Iterator[_Task]:
    """A sample of every tensor, and where all is to be read, all of the tensors that are larger than a sample."""
    for index, tensor in enumerate(alignment.tensors):
        is_summed = num_samples is not None or tensor.num_elements <= DEFAULT_SAMPLE
        count = num_samples or (DEFAULT_SAMPLE if is_summed else KEPT_SAMPLE)
        yield _Task(index, tuple(sample_stretches(tensor.num_elements, count)), is_summed=is_summed, is_kept=True)
        if not is_summed:
            for start in range(0, tensor.num_elements, span):
                piece = Stretch(start, min(span, tensor.num_elements - start))
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
    basis: Floats | None = None
    kept: NDArray[np.float32] | None = None


class _Summer:
    """Reads tasks and sums them up; belongs to one worker."""

    def __init__(self, reading: _Reading) -> None:
        self._reading, self._reader, self._scratch = reading, Reader(reading.resources.io), Scratch()

    def fill(self, number: int) -> Part:
        task = self._reading.tasks[number]
        entries = self._reading.alignment.tensors[task.index].entries
        part = Part(number, task.count * self._reading.itemsize(task))
        if not task.is_kept:
            part.products = self._full_products(entries, task.pieces[0])
        else:
            basis = self._memory(len(entries) + 1, task.count, np.float64)
            values = read_trajectory(self._reader, entries, task.pieces, basis[:-1], self._scratch)
            part.kept = _thin(values, self._reading.num_kept)
            part.products = inner_products(to_basis(basis)) if task.is_summed else None
        self._reader.release()
        return part

    def _full_products(self, entries: Sequence[TensorEntry], span: Stretch) -> NDArray[np.float64]:
        products = np.zeros((len(entries) + 1, len(entries) + 1))
        for piece in stretches(span.count, num_snapshots=len(entries), limit=BLOCK):
            products += self._products(entries, Stretch(span.start + piece.start, piece.count))
        return products

    def _products(self, entries: Sequence[TensorEntry], piece: Stretch) -> NDArray[np.float64]:
        """In float32 where the values are of such types and it can hold their products."""
        if all(work_type(entry.dtype) is np.float32 for entry in entries):
            basis = self._memory(len(entries) + 1, piece.count, np.float32)
            read_in_any_order(self._reader, entries, piece, basis[:-1], self._scratch)
            with np.errstate(all="ignore"):  # what is not finite, or becomes so, is looked for afterwards
                products = inner_products(to_basis(basis))
            if are_held(products, basis):
                return products
        basis = self._memory(len(entries) + 1, piece.count, np.float64)
        read_trajectory(self._reader, entries, [piece], basis[:-1], self._scratch)
        return inner_products(to_basis(basis))

    def _memory(self, num_rows: int, count: int, dtype: WorkType) -> Floats:
        return self._scratch.named("basis", num_rows * count, dtype).reshape(num_rows, count)

    def close(self) -> None:
        """Nothing to do: the reader's files close with it."""


class _Gatherer(_Summer):
    """Reads tasks for a device to sum up: in float64, in memory of their own."""

    def fill(self, number: int) -> Part:
        task = self._reading.tasks[number]
        entries = self._reading.alignment.tensors[task.index].entries
        basis = np.empty((len(entries) + 1, task.count))
        values = read_trajectory(self._reader, entries, task.pieces, basis[:-1], self._scratch)
        self._reader.release()
        part = Part(number, task.count * self._reading.itemsize(task))
        part.kept = _thin(values, self._reading.num_kept) if task.is_kept else None
        part.basis = to_basis(basis) if task.is_summed else None
        return part


def _parts(reading: _Reading) -> Iterator[Part]:
    num_tasks, device, num_workers = len(reading.tasks), reading.resources.device, reading.resources.num_workers
    if device != "cpu":
        return _multiplied(workers.in_threads(num_tasks, partial(_Gatherer, reading), max(num_workers, 2)), device)
    return workers.on_cores(num_tasks, partial(_Summer, reading), num_workers if reading.num_bytes >= FORK_BYTES else 1)


def _multiplied(parts: Iterator[Part], device: str) -> Iterator[Part]:
    """The parts with their products in place of their bases, made on a device, as many at once as it may hold."""
    from farcast_cli.forecast.device_gram import BATCH_BYTES, products_of

    held: list[Part] = []
    bases: list[Floats] = []

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


def _thin(values: Floats, num_kept: int) -> NDArray[np.float32]:
    """At most `num_kept` of N elements, evenly spread: (M, T)."""
    count = values.shape[1]
    chosen = np.linspace(0, count - 1, min(count, num_kept)).round().astype(np.int64)
    return np.ascontiguousarray(values[:, chosen].T.astype(np.float32))


def bytes_to_sample(snapshots: Sequence[Snapshot], num_samples: int | None) -> int:
    """What `accumulate` will read at most: a sample (or, with None, all) of every tensor at every snapshot."""
    entries = [entry for snapshot in snapshots for entry in snapshot.tensors.values()]
    return sum(min(e.num_elements, num_samples or e.num_elements) * e.dtype.itemsize for e in entries)
