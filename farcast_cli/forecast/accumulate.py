"""One pass over a run's tensors that sums up their inner products, on a sample or on everything.

Knows what is read, in which order it is summed, and in which precision. A sample is summed in float64. A full pass over
millions of elements multiplies in float32, some thousand at a time, and adds up in float64; what float32 cannot hold is
read again in float64.

Shapes: K tensors, T snapshots, R = T + 1 basis vectors, N elements of a stretch, M sampled elements.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.engine import native, workers
from farcast_cli.engine.casts import work_type
from farcast_cli.engine.ranks import Seat, Team
from farcast_cli.engine.reader import (
    MAX_STRETCH,
    STRETCH_BYTES,
    Reader,
    Resources,
    Scratch,
    TensorStretches,
    read_raw,
    read_trajectory,
    read_values,
    stretches,
)
from farcast_cli.files.reading import fetch, reading_in_kernel
from farcast_cli.forecast.gram import Gram, Sample
from farcast_cli.forecast.products import are_held, in_basis_order, inner_products, to_basis, whole_products
from farcast_cli.tensors import Stretch, sample_stretches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from farcast_cli.engine.casts import Floats, WorkType
    from farcast_cli.files.reading import FileStretch
    from farcast_cli.run.alignment import Alignment
    from farcast_cli.trainers.base import Snapshot

KEPT_SAMPLE = 1_024  # of those, kept for the fits that are not least squares; within .005 of a full fit
KEPT_BYTES = 64 << 20  # for all kept samples together
MIN_KEPT = 64
MAX_KEPT_BYTES = 128 << 20  # up to which there are no fewer of a tensor
FORK_BYTES = 16 << 20  # to be read, from which on processes pay for their start
SPAN = 1 << 20  # elements of a tensor that a worker sums up before it says so
_STEP = "sums"


def accumulate(
    alignment: Alignment,
    steps: Sequence[int],
    *,
    num_samples: int | None = DEFAULT_SAMPLE,
    resources: Resources | None = None,
    team: Team | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Gram, Sample]:
    """Read a sample (or, with None, all) of every tensor at every snapshot and sum up its inner products.

    One pass over what it reads, in parallel, in stretches of tensors; sums are taken in order, so that the result does not
    depend on the number of workers, nor on that of ranks. Peak memory: a stretch at all snapshots for each worker, and the
    result.

    Args:
        team: the ranks that share the work; this one leads, and the others `hand_in`.

    Raises:
        NonFiniteError: NaN or infinity in what was read.
    """
    num_snapshots, num_tensors = len(steps), len(alignment.tensors)
    team = team or Team()
    reading = _reading(alignment, num_samples, resources)
    products = np.zeros((num_tensors, num_snapshots + 1, num_snapshots + 1))
    seen = np.zeros(num_tensors)
    bounds = np.concatenate([[0], np.cumsum([min(n, reading.num_kept) for n in reading.counts])]).astype(np.int64)
    values = np.empty((bounds[-1], num_snapshots), np.float32)
    for task, sums in zip(reading.tasks, itertools.chain(_own(reading, team), _of_others(reading, team)), strict=True):
        if sums.products is not None:
            products[task.tensors] += sums.products
            seen[task.tensors] += [tensor.count for tensor in task.stretches]
            progress(task.num_bytes)
        if sums.kept is not None:
            values[bounds[task.tensors.start] : bounds[task.tensors.stop]] = sums.kept
    sizes = np.array([tensor.num_elements for tensor in alignment.tensors], dtype=np.int64)
    products *= (sizes / seen)[:, None, None]
    return Gram(np.array(steps, dtype=np.int64), products), Sample(values, bounds, sizes)


def hand_in(
    alignment: Alignment, *, num_samples: int | None = DEFAULT_SAMPLE, resources: Resources | None = None, team: Team
) -> None:
    """Read and sum up this rank's share for rank 0, which adds up all shares in `accumulate`.

    Raises:
        NonFiniteError: NaN or infinity in what was read.
    """
    with team.handing_in(_STEP) as file:
        for sums in _own(_reading(alignment, num_samples, resources), team):
            for array in (sums.products, sums.kept):
                if array is not None:
                    file.write(array.tobytes())


def _reading(alignment: Alignment, num_samples: int | None, resources: Resources | None) -> _Reading:
    resources = resources or Resources()
    num_kept = _num_kept(len(alignment.tensors[0].entries), len(alignment.tensors))
    return _Reading(_tasks(alignment, num_samples, resources), resources, num_kept)


def _own(reading: _Reading, team: Team) -> Iterator[Sums]:
    """This rank's share, in order."""
    mine = reading.share(team.seat)
    fetch(stretch for task in mine.tasks for stretch in task.in_files)
    for sums in workers.in_order(_sums(mine)):
        team.beat()
        yield sums


def _of_others(reading: _Reading, team: Team) -> Iterator[Sums]:
    """The shares of all other ranks on rank 0, in the order of their tasks."""
    seats = (Seat(rank, team.seat.count) for rank in range(1, team.seat.count))
    for seat, file in zip(seats, team.handed_in(_STEP), strict=True):
        for number, task in enumerate(reading.share(seat).tasks):
            team.beat()
            yield task.sums_in(file, number, reading.num_kept)


def _num_kept(num_snapshots: int, num_tensors: int) -> int:
    """Of each tensor, so that all samples together stay within their limits."""
    each = 4 * num_snapshots * num_tensors
    return min(KEPT_SAMPLE, max(min(MIN_KEPT, MAX_KEPT_BYTES // each), KEPT_BYTES // each, 1))


@dataclass(slots=True)
class _Task:
    """Samples of some neighbouring tensors, to be kept a few of and perhaps summed up; or a part of one, to be summed up."""

    first: int
    stretches: list[TensorStretches]
    is_summed: bool
    is_kept: bool
    count: int = field(init=False)
    """Elements."""
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = sum(tensor.count for tensor in self.stretches)
        self.num_bytes = sum(tensor.num_bytes for tensor in self.stretches)

    def take(self, tensor: TensorStretches, limit: int) -> bool:
        """Take the next tensor's sample too, if it is of the same types and all have no more than `limit` values, and products."""
        mine, its = self.stretches[0].entries, tensor.entries
        num_snapshots, num_tensors = len(its), len(self.stretches) + 1
        numbers = max((self.count + tensor.count) * num_snapshots, num_tensors * (num_snapshots + 1) ** 2)
        fits = self.is_kept and self.is_summed and numbers <= limit
        if not fits or any(a.dtype is not b.dtype for a, b in zip(mine, its, strict=True)):
            return False
        self.stretches.append(tensor)
        self.count += tensor.count
        self.num_bytes += tensor.num_bytes
        return True

    @property
    def tensors(self) -> slice:
        return slice(self.first, self.first + len(self.stretches))

    def sums_in(self, file: BinaryIO, number: int, num_kept: int) -> Sums:
        """What another rank handed in of it."""
        num_snapshots = len(self.stretches[0].entries)
        sums, num_rows = Sums(number), num_snapshots + 1
        if self.is_summed:
            sums.products = np.frombuffer(file.read(8 * len(self.stretches) * num_rows**2)).reshape(-1, num_rows, num_rows)
        if self.is_kept:
            count = sum(min(tensor.count, num_kept) for tensor in self.stretches)
            sums.kept = np.frombuffer(file.read(4 * count * num_snapshots), np.float32).reshape(count, num_snapshots)
        return sums

    @property
    def in_files(self) -> Iterator[FileStretch]:
        """What of the files is read."""
        return (found for tensor in self.stretches for t in range(len(tensor.entries)) for found in tensor.at(t))


def _tasks(alignment: Alignment, num_samples: int | None, resources: Resources) -> tuple[_Task, ...]:
    """A sample of every tensor, and where all is to be read, all of the tensors that are larger than a sample."""
    found, is_host = list[_Task](), resources.device == "cpu"
    limit = STRETCH_BYTES // 8 if is_host else 0
    for index, tensor in enumerate(alignment.tensors):
        entries, size = tensor.entries, tensor.num_elements
        is_summed = num_samples is not None or size <= DEFAULT_SAMPLE
        sampled = TensorStretches(
            entries, sample_stretches(size, num_samples or (DEFAULT_SAMPLE if is_summed else KEPT_SAMPLE))
        )
        if not (found and is_summed and found[-1].take(sampled, limit)):
            found.append(_Task(index, [sampled], is_summed=is_summed, is_kept=True))
        if not is_summed:
            span = SPAN if is_host else MAX_STRETCH
            for start in range(0, size, span):
                part = TensorStretches(entries, (Stretch(start, min(span, size - start)),))
                found.append(_Task(index, [part], is_summed=True, is_kept=False))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What is read, and how."""

    tasks: tuple[_Task, ...]
    resources: Resources
    num_kept: int

    def share(self, seat: Seat) -> _Reading:
        """A rank's share: neighbouring tasks, of about as many bytes as every other rank's. All shares in order are all tasks."""
        if seat.count == 1:
            return self
        ends = np.cumsum([task.num_bytes for task in self.tasks])
        first, last = (int(np.searchsorted(ends, ends[-1] * at // seat.count, "right")) for at in (seat.rank, seat.rank + 1))
        return replace(self, tasks=self.tasks[first:last])

    @property
    def counts(self) -> list[int]:
        """Of each tensor, the elements that some are kept of."""
        return [tensor.count for task in self.tasks if task.is_kept for tensor in task.stretches]


@dataclass(slots=True)
class Sums:
    """What came of a task: products (K, R, R) of its tensors, or the basis (R, N) for a device to multiply; weights (M, T)."""

    number: int
    products: NDArray[np.float64] | None = None
    basis: Floats | None = None
    kept: NDArray[np.float32] | None = None


class _Summer:
    """Reads tasks and sums them up; belongs to one worker."""

    def __init__(self, reading: _Reading) -> None:
        self._reading, self._reader, self._scratch = reading, Reader(reading.resources.io), Scratch()

    def fill(self, number: int) -> Sums:
        task, sums = self._reading.tasks[number], Sums(number)
        if not task.is_kept:
            sums.products = self._full_products(task.stretches[0])[None]
        else:
            basis = self._memory(task.stretches, np.float64)
            values = read_trajectory(self._reader, task.stretches, basis[:-1], self._scratch)
            sums.kept = _thin(values, task.stretches, self._reading.num_kept)
            sums.products = _products_of_each(to_basis(basis), task.stretches) if task.is_summed else None
        self._reader.release()
        return sums

    def _full_products(self, span: TensorStretches) -> NDArray[np.float64]:
        if (found := self._by_kernel(span)) is not None:
            return found
        products = np.zeros((len(span.entries) + 1, len(span.entries) + 1))
        for part in _parts(span):
            products += self._products(part)
        return products

    def _by_kernel(self, span: TensorStretches) -> NDArray[np.float64] | None:
        """The same in the compiled kernel; None where it does not serve, or float32 does not hold the products."""
        kernel, types = native.KERNEL, native.codes_of([entry.dtype for entry in span.entries])
        if kernel is None or types is None or not _in_float32(span):
            return None
        num_rows = -(-len(types) // native.SIDE) * native.SIDE
        lower, totals, moved = np.zeros((num_rows, num_rows)), np.zeros(len(types)), np.zeros(len(types), np.uint8)
        sources = self._reader.for_kernel([found for t in range(len(types)) for found in span.at(t)])
        for part in (span,) if sources else _parts(span):
            values = sources or read_raw(self._reader, part, self._scratch)
            with reading_in_kernel():
                kernel.products(values, types, part.count, lower, totals, moved)
        products = whole_products(lower, totals, span.count)
        return products if are_held(products, lambda row: bool(moved[row])) else None

    def _products(self, tensor: TensorStretches) -> NDArray[np.float64]:
        """In float32 where the values are of such types and it can hold their products."""
        if _in_float32(tensor):
            basis = self._memory((tensor,), np.float32)
            read_values(self._reader, (tensor,), basis[:-1], self._scratch)
            with np.errstate(all="ignore"):  # what is not finite, or becomes so, is looked for afterwards
                products = inner_products(to_basis(basis))
            if are_held(products, lambda row: bool(basis[row].any())):
                return products
        basis = self._memory((tensor,), np.float64)
        read_trajectory(self._reader, (tensor,), basis[:-1], self._scratch)
        return inner_products(to_basis(basis))

    def _memory(self, tensors: Sequence[TensorStretches], dtype: WorkType) -> Floats:
        num_rows, count = len(tensors[0].entries) + 1, sum(tensor.count for tensor in tensors)
        return self._scratch.named("basis", num_rows * count, dtype).reshape(num_rows, count)

    def close(self) -> None:
        """Nothing to do: the reader's files close with it."""


class _Gatherer(_Summer):
    """Reads tasks for a device to sum up: in float64, in memory of their own."""

    def fill(self, number: int) -> Sums:
        task = self._reading.tasks[number]
        basis = np.empty((len(task.stretches[0].entries) + 1, task.count))
        values = read_trajectory(self._reader, task.stretches, basis[:-1], self._scratch)
        self._reader.release()
        kept = _thin(values, task.stretches, self._reading.num_kept) if task.is_kept else None
        return Sums(number, kept=kept, basis=to_basis(basis) if task.is_summed else None)


def _in_float32(tensor: TensorStretches) -> bool:
    """Whether the values are of such types."""
    return all(work_type(entry.dtype) is np.float32 for entry in tensor.entries)


def _parts(span: TensorStretches) -> Iterator[TensorStretches]:
    """A stretch of a tensor in parts, each of which fits the budget at all snapshots together."""
    (whole,) = span.stretches
    for part in stretches(whole.count, num_snapshots=len(span.entries), itemsize=4):
        yield TensorStretches(span.entries, (Stretch(whole.start + part.start, part.count),))


def _products_of_each(basis: Floats, tensors: Sequence[TensorStretches]) -> NDArray[np.float64]:
    """(K, R, R) of the basis (R, N) of K tensors, one behind the other."""
    ends = np.cumsum([tensor.count for tensor in tensors])
    return in_basis_order(np.stack([rows @ rows.T for rows in np.split(basis, ends[:-1], axis=1)]))


def _sums(reading: _Reading) -> Iterator[Sums]:
    num_tasks, device, num_workers = len(reading.tasks), reading.resources.device, reading.resources.num_workers
    if device != "cpu":
        return _multiplied(workers.in_threads(num_tasks, partial(_Gatherer, reading), max(num_workers, 2)), device)
    pays = sum(task.num_bytes for task in reading.tasks) >= FORK_BYTES
    by_kernel = native.KERNEL is not None and not all(task.is_kept for task in reading.tasks)
    return workers.on_cores(num_tasks, partial(_Summer, reading), num_workers if pays else 1, by_kernel=by_kernel)


def _multiplied(found: Iterator[Sums], device: str) -> Iterator[Sums]:
    """The sums with their products in place of their bases, made on a device, as many at once as it may hold."""
    from farcast_cli.forecast.device_gram import BATCH_BYTES, products_of

    held: list[Sums] = []
    bases: list[Floats] = []

    def flush() -> Iterator[Sums]:
        for sums, products in zip(held, products_of(bases, device) if held else (), strict=True):
            sums.products = in_basis_order(products)[None]
            yield sums
        held.clear()
        bases.clear()

    for sums in found:
        if sums.basis is None:
            yield sums
            continue
        if (len(held) + 1) * max(sums.basis.nbytes, *(basis.nbytes for basis in bases), 0) > BATCH_BYTES:
            yield from flush()
        held.append(sums)
        bases.append(sums.basis)
        sums.basis = None
    yield from flush()


def _thin(values: Floats, tensors: Sequence[TensorStretches], num_kept: int) -> NDArray[np.float32]:
    """At most `num_kept` elements of each tensor of values (T, N), evenly spread: (M, T)."""
    counts = [tensor.count for tensor in tensors]
    starts = [0, *itertools.accumulate(counts)]
    chosen = [start + _evenly(count, num_kept) for start, count in zip(starts, counts, strict=False)]
    return np.ascontiguousarray(values[:, np.concatenate(chosen)].T.astype(np.float32))


@lru_cache(maxsize=256)
def _evenly(count: int, num_kept: int) -> NDArray[np.int64]:
    """At most `num_kept` of `count` places."""
    return np.linspace(0, count - 1, min(count, num_kept)).round().astype(np.int64)


def bytes_to_sample(snapshots: Sequence[Snapshot], num_samples: int | None) -> int:
    """What `accumulate` will read at most: a sample (or, with None, all) of every tensor at every snapshot."""
    entries = [entry for snapshot in snapshots for entry in snapshot.tensors.values()]
    return sum(min(e.num_elements, num_samples or e.num_elements) * e.dtype.itemsize for e in entries)
