"""The one full pass over the files: read stretches, add the forecast step, write the checkpoint, publish it.

Shapes: K tensors, T snapshots read, N elements of a stretch, H horizons forecast in the same pass.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from farcast_cli.errors import SnapshotError
from farcast_cli.output.plan import Copy, Fixed, Mapped, OutputFile, Piece, Record, Values, Zeros
from farcast_cli.output.writer import Sink
from farcast_cli.stream import Reader, Scratch, Stretch, buffer_of, non_finite, stretches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.alignment import Alignment
    from farcast_cli.tensors import TensorEntry

COPY_BYTES = 4 << 20
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
QUEUED_PER_THREAD = 2  # finished stretches that may wait for the writer


@dataclass(frozen=True, slots=True)
class LinearMap:
    """Forecasts as sums over snapshots, per horizon and tensor.

        w_hat = w_s + sum_t weights_t (w_t - w_s) + gain w_s + constant

    Args:
        weights: (H, K, T); the origin's own column is not used.
        gain, constant: (H, K); zero for every method but lfd2.
        origin: the origin's index among the T snapshots.
    """

    weights: NDArray[np.float64]
    gain: NDArray[np.float64]
    constant: NDArray[np.float64]
    origin: int

    @classmethod
    def from_steps(cls, steps: Sequence[NDArray[np.float64]], origin: int) -> LinearMap:
        """From steps (K, R) over the Gram basis, one for each horizon.

        c_t (w_t - w_{t-1}) summed over t gives snapshot t the weight c_t - c_{t+1}.
        """
        stacked = np.stack(steps)  # (H, K, R)
        increments = stacked[..., :-2]
        edges = np.zeros((*increments.shape[:-1], 1))
        weights = np.concatenate([edges, increments], axis=-1) - np.concatenate([increments, edges], axis=-1)
        base, constant = stacked[..., -2], stacked[..., -1]
        weights[..., 0] += base
        return cls(weights, base, constant, origin)

    @property
    def used(self) -> list[int]:
        """The snapshots that any forecast reads, the origin among them."""
        needed = np.any(self.weights != 0, axis=(0, 1))
        needed[self.origin] = True
        return [int(index) for index in np.flatnonzero(needed)]

    def restrict(self, keep: Sequence[int]) -> LinearMap:
        return LinearMap(self.weights[..., list(keep)], self.gain, self.constant, list(keep).index(self.origin))


@dataclass(slots=True)
class Tally:
    """What a pass did."""

    bytes_read: int = 0
    bytes_written: int = 0
    unchanged: list[int] = field(default_factory=list)
    num_forecast: int = 0
    seconds: float = 0.0

    def unchanged_share(self, index: int) -> float:
        return self.unchanged[index] / self.num_forecast if self.num_forecast else 1.0


@dataclass(frozen=True, slots=True)
class Engine:
    """What computes a piece: the aligned tensors of the snapshots that are read, the map, and the device."""

    alignment: Alignment
    linear: LinearMap
    device: torch.device
    reader: Reader = field(default_factory=Reader)
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def num_horizons(self) -> int:
        return len(self.linear.weights)


@dataclass(frozen=True, slots=True)
class _Result:
    """What a worker made, for each horizon; `is_taken` says that the memory is the scratch's, to be given back."""

    data: list[torch.Tensor]
    bytes_read: int = 0
    unchanged: Sequence[int] = ()
    num_forecast: int = 0
    is_taken: bool = True


def total_bytes(outputs: Sequence[OutputFile]) -> int:
    return sum(output.num_bytes for output in outputs)


def bytes_to_read(outputs: Sequence[OutputFile], engine: Engine) -> int:
    """What a pass over one horizon's plan reads: a forecast tensor at all its snapshots, everything else once."""
    total = 0
    for output in outputs:
        for piece in (piece for record in output.records for piece in record.pieces):
            if isinstance(piece, Values) and piece.index is not None:
                entries = engine.alignment.tensors[piece.index].entries
                count = piece.entry.num_elements
                total += sum(entries[t].dtype.bytes_of(count) for t in _snapshots_of(engine, piece.index))
            elif isinstance(piece, (Copy, Values, Mapped)):
                total += piece.num_bytes if isinstance(piece, Copy) else piece.entry.num_bytes
    return total


def write_forecasts(
    plans: Sequence[Sequence[OutputFile]],
    targets: Sequence[Path],
    engine: Engine,
    *,
    num_threads: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Tally:
    """Write one checkpoint per horizon in a single pass over the snapshots.

    Peak memory: (threads + queue) stretches at T snapshots, whatever the model's size.

    Args:
        plans: H plans of the same shape; they differ in counters alone.
        targets: H paths that do not exist yet, files or folders.
        progress: called with bytes written.
    """
    started = time.monotonic()
    tally = Tally(unchanged=[0] * len(plans))
    with ThreadPoolExecutor(num_threads) as pool:
        shared = _Pass(engine, pool, num_threads * QUEUED_PER_THREAD, tally, progress)
        for outputs in zip(*plans, strict=True):
            with ExitStack() as stack:
                sinks = [Sink(target / o.name if o.name else target) for o, target in zip(outputs, targets, strict=True)]
                for sink in sinks:
                    stack.callback(sink.close)
                for records in zip(*(output.records for output in outputs), strict=True):
                    _write_record(records, sinks, shared)
    tally.seconds = time.monotonic() - started
    return tally


@dataclass(frozen=True, slots=True)
class _Pass:
    """What all records of a pass share."""

    engine: Engine
    pool: ThreadPoolExecutor
    num_queued: int
    tally: Tally
    progress: Callable[[int], None]


def _write_record(records: tuple[Record, ...], sinks: Sequence[Sink], shared: _Pass) -> None:
    for sink, record in zip(sinks, records, strict=True):
        sink.begin(record.checksums_at)
    waiting: deque[Future[_Result]] = deque()
    jobs = (job for pieces in zip(*(record.pieces for record in records), strict=True) for job in _jobs(pieces, shared.engine))
    try:
        for job in jobs:
            waiting.append(shared.pool.submit(job))
            if len(waiting) > shared.num_queued:
                _take(waiting.popleft(), sinks, shared)
        while waiting:
            _take(waiting.popleft(), sinks, shared)
    finally:
        for future in waiting:
            future.cancel()


def _take(future: Future[_Result], sinks: Sequence[Sink], shared: _Pass) -> None:
    result = future.result()
    written = 0
    for sink, data in zip(sinks, result.data, strict=True):
        sink.write(buffer_of(data))
        written += data.numel()
    for data in {id(data): data for data in result.data}.values() if result.is_taken else ():
        shared.engine.scratch.give_back(data)
    tally = shared.tally
    tally.bytes_read += result.bytes_read
    tally.bytes_written += written
    tally.num_forecast += result.num_forecast
    tally.unchanged = [a + b for a, b in zip(tally.unchanged, result.unchanged or [0] * len(sinks), strict=True)]
    shared.progress(written)


# --- jobs: what a worker does ----------------------------------------------------------------------------------------


def _jobs(pieces: tuple[Piece, ...], engine: Engine) -> Iterator[Callable[[], _Result]]:
    """The work for one piece of every horizon's plan, in stretches."""
    first = pieces[0]
    if isinstance(first, Values):
        index = first.index
        num_snapshots = 1 if index is None else len(_snapshots_of(engine, index))
        itemsize = max(4, first.entry.dtype.itemsize)
        for stretch in stretches(
            first.entry.num_elements, num_snapshots=num_snapshots + engine.num_horizons, itemsize=itemsize
        ):
            yield lambda stretch=stretch: _forecast_stretch(first, stretch, engine)  # type: ignore[misc]
    elif isinstance(first, Mapped):
        for stretch in stretches(first.entry.num_elements, num_snapshots=2, itemsize=max(4, first.entry.dtype.itemsize)):
            yield lambda stretch=stretch: _map_stretch(first, stretch, engine)  # type: ignore[misc]
    elif isinstance(first, Copy):
        for start, count in _chunks(first.num_bytes):
            yield lambda start=start, count=count: _copy_stretch(first, start, count, engine)  # type: ignore[misc]
    elif isinstance(first, Zeros):
        for _, count in _chunks(first.num_bytes):
            yield lambda count=count: _Result([engine.scratch.take(count).zero_()] * len(pieces))  # type: ignore[misc]
    else:
        yield lambda: _Result([_fixed(piece) for piece in pieces], is_taken=False)


def _chunks(num_bytes: int) -> Iterator[tuple[int, int]]:
    """Stretches of bytes, (start, count), that a worker holds at once."""
    for start in range(0, num_bytes, COPY_BYTES):
        yield start, min(COPY_BYTES, num_bytes - start)


def _fixed(piece: Piece) -> torch.Tensor:
    assert isinstance(piece, Fixed)  # noqa: S101 - the plan's last kind
    return torch.frombuffer(bytearray(piece.data), dtype=torch.uint8) if piece.data else torch.empty(0, dtype=torch.uint8)


def _copy_stretch(piece: Copy, start: int, count: int, engine: Engine) -> _Result:
    raw = engine.scratch.take(count)
    engine.reader.read_bytes(piece.path, piece.offset + start, raw)
    return _Result([raw] * engine.num_horizons, bytes_read=count)


def _map_stretch(piece: Mapped, stretch: Stretch, engine: Engine) -> _Result:
    source = _read(piece.entry, stretch, engine, "source")
    work = torch.float64 if piece.entry.dtype.name == "float64" else torch.float32
    values = torch.from_numpy(piece.function(source.to(work).numpy(), piece.begin + stretch.start))
    limit = torch.finfo(getattr(torch, piece.dtype.name)).max
    if not bool((values.abs() <= limit).all()):
        raise SnapshotError(f"{piece.entry.path}: tensor {piece.entry.name!r} leaves the range of its type (+-{limit:g})")
    taken = engine.scratch.take(stretch.count * piece.dtype.itemsize)
    taken.view(getattr(torch, piece.dtype.name)).copy_(values)
    return _Result([taken] * engine.num_horizons, source.nbytes)


def _snapshots_of(engine: Engine, index: int) -> list[int]:
    """The snapshots that a tensor's forecasts read; only the origin where its step is zero."""
    linear = engine.linear
    needed = np.any(linear.weights[:, index] != 0, axis=0)
    needed[linear.origin] = True
    return [int(t) for t in np.flatnonzero(needed)]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A stretch of a tensor: the origin's values (N,) and how far each other snapshot lies from them."""

    source: torch.Tensor
    last: torch.Tensor
    moves: Sequence[torch.Tensor]
    origin: TensorEntry
    others: Sequence[TensorEntry]
    num_bytes: int


def _forecast_stretch(piece: Values, stretch: Stretch, engine: Engine) -> _Result:
    """One stretch of one tensor at all horizons."""
    source = _read(piece.entry, stretch, engine, "source")
    if piece.index is None:
        return _Result([_cast(source, piece, engine)] * engine.num_horizons, source.nbytes)
    loaded = _load(source, piece, stretch, engine)
    data, unchanged = [], []
    for horizon in range(engine.num_horizons):
        values = _checked(_add_step(loaded, piece.index, horizon, engine), loaded, piece)
        data.append(_cast(values, piece, engine))
        unchanged.append(_num_equal(data[-1], source, piece))
    return _Result(data, loaded.num_bytes, unchanged, stretch.count)


def _read(entry: TensorEntry, stretch: Stretch, engine: Engine, name: str) -> torch.Tensor:
    raw = engine.scratch.named(name, stretch.count * entry.dtype.itemsize, torch.uint8)
    return engine.reader.read_values(entry, stretch, raw)


def _load(source: torch.Tensor, piece: Values, stretch: Stretch, engine: Engine) -> _Loaded:
    assert piece.index is not None  # noqa: S101 - the caller's branch
    last = _to_device(source, piece, engine, "last")
    entries = engine.alignment.tensors[piece.index].entries
    others = [entries[t] for t in _snapshots_of(engine, piece.index) if t != engine.linear.origin]
    moves, num_bytes = [], source.nbytes
    for number, entry in enumerate(others):
        values = _read(entry, Stretch(piece.begin + stretch.start, stretch.count), engine, "other")
        num_bytes += values.nbytes
        moves.append(_to_device(values, piece, engine, f"move {number}").sub_(last))
    return _Loaded(source, last, moves, piece.entry, others, num_bytes)


def _to_device(values: torch.Tensor, piece: Values, engine: Engine, name: str) -> torch.Tensor:
    """Values in the type of the arithmetic, on the device: a copy that may be changed."""
    work = torch.float64 if piece.entry.dtype.name == "float64" else torch.float32
    if engine.device.type != "cpu":
        return values.to(engine.device).to(work, copy=True)
    return engine.scratch.named(name, len(values), work).copy_(values)


def _add_step(loaded: _Loaded, index: int, horizon: int, engine: Engine) -> torch.Tensor:
    """w_s plus the step, elementwise, in a fixed order of operations (no fused multiply-add, which rounds otherwise).

    An element that is the same in all snapshots keeps its bits, -0.0 included.
    """
    linear, last = engine.linear, loaded.last
    used = [t for t in _snapshots_of(engine, index) if t != linear.origin]
    step, term = _scratch_like(last, engine, "step").zero_(), _scratch_like(last, engine, "term")
    for move, weight in zip(loaded.moves, linear.weights[horizon, index, used], strict=True):
        step += torch.mul(move, float(weight), out=term)
    gain, constant = float(linear.gain[horizon, index]), float(linear.constant[horizon, index])
    if gain or constant:
        moved = torch.zeros_like(last, dtype=torch.bool)
        for move in loaded.moves:
            moved |= move != 0
        step = torch.where(moved, step + last * gain + constant, 0.0)
    if _num_negative_zeros(loaded.source):
        return torch.where(step == 0, last, last + step)
    return step.add_(last)


def _scratch_like(values: torch.Tensor, engine: Engine, name: str) -> torch.Tensor:
    return engine.scratch.named(name, len(values), values.dtype) if values.device.type == "cpu" else torch.empty_like(values)


def _bits(values: torch.Tensor) -> NDArray[np.signedinteger[Any]]:
    return values.view(_INTEGER[values.dtype.itemsize]).numpy()


def _num_equal(data: torch.Tensor, source: torch.Tensor, piece: Values) -> int:
    """How many elements have the origin's bits; numpy counts them ten times as fast as torch does."""
    dtype = getattr(torch, piece.dtype.name)
    return int(np.count_nonzero(_bits(data.view(dtype)) == _bits(source.to(dtype))))


def _num_negative_zeros(values: torch.Tensor) -> int:
    integers = _bits(values)
    return int(np.count_nonzero(integers == np.iinfo(integers.dtype).min))


def _checked(values: torch.Tensor, loaded: _Loaded, piece: Values) -> torch.Tensor:
    """Refuse NaN and infinity, but for elements that are the same infinity in every snapshot: those stay.

    Also keeps BatchNorm's variance from falling below zero.
    """
    low, high = torch.aminmax(values)
    limit = torch.finfo(getattr(torch, piece.dtype.name)).max
    if not (-limit <= float(low) and float(high) <= limit):
        values = _without_infinities(values, loaded, limit)
    return values.clamp_min(0) if piece.non_negative else values


def _without_infinities(values: torch.Tensor, loaded: _Loaded, limit: float) -> torch.Tensor:
    """The values with constant infinities put back; an error that names the snapshot, or the type's range, for others."""
    last = loaded.last
    still = torch.isinf(last)
    for move in loaded.moves:  # inf - inf is NaN where the snapshots agree, infinite where they do not
        still &= torch.isnan(move)
    bad = ~torch.isfinite(last) & ~still
    if bool(bad.any()):
        raise non_finite(loaded.origin, last[bad][0].item())
    for move, entry in zip(loaded.moves, loaded.others, strict=True):
        bad = ~torch.isfinite(move) & ~still
        if bool(bad.any()):
            raise non_finite(entry, move[bad][0].item())
    kept = torch.where(still, torch.zeros_like(values), values)
    if not bool((kept.abs() <= limit).all()):
        entry = loaded.origin
        raise SnapshotError(
            f"{entry.path}: the forecast of tensor {entry.name!r} leaves the range of its type (+-{limit:g})",
            hint="--scale .5 takes a smaller step; --dtype float32 widens the range",
        )
    return torch.where(still, last, values)


def _cast(values: torch.Tensor, piece: Values, engine: Engine) -> torch.Tensor:
    """The bytes of values in the output's type, in memory of their own."""
    dtype = getattr(torch, piece.dtype.name)
    taken = engine.scratch.take(len(values) * dtype.itemsize)
    taken.view(dtype).copy_(values)
    return taken
