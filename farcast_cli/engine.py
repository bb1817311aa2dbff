"""The one full pass over the files: read stretches, add the forecast step, write the checkpoint, publish it.

Shapes: K tensors, T snapshots read, N elements of a stretch, H horizons forecast in the same pass.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from farcast_cli.errors import NonFiniteError, SnapshotError
from farcast_cli.plan import Copy, Literal_, OutputFile, Piece, Record, Values, Zeros
from farcast_cli.stream import Reader, Stretch, non_finite, stretches
from farcast_cli.writer import RawSink, Sink, ZipSink

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.trajectory import AlignedTensor, Alignment

COPY_BYTES = 4 << 20
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

    @property
    def num_horizons(self) -> int:
        return len(self.linear.weights)


@dataclass(frozen=True, slots=True)
class _Result:
    data: list[torch.Tensor]
    bytes_read: int = 0
    unchanged: Sequence[int] = ()
    num_forecast: int = 0


def total_bytes(outputs: Sequence[OutputFile]) -> int:
    return sum(output.num_bytes for output in outputs)


def bytes_to_read(outputs: Sequence[OutputFile], engine: Engine) -> int:
    """What a pass over one horizon's plan reads: a forecast tensor at all its snapshots, everything else once."""
    total = 0
    for output in outputs:
        for piece in (piece for record in output.records for piece in record.pieces):
            if isinstance(piece, Values) and piece.index is not None:
                entries = engine.alignment.tensors[piece.index].entries
                total += sum(entries[t].num_bytes for t in _snapshots_of(engine, piece.index))
            elif isinstance(piece, (Copy, Values)):
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
        for outputs in zip(*plans, strict=True):
            with ExitStack() as stack:
                sinks = [_open_sink(output, target) for output, target in zip(outputs, targets, strict=True)]
                for sink in sinks:
                    stack.callback(sink.close)
                for records in zip(*(output.records for output in outputs), strict=True):
                    _write_record(records, sinks, engine, pool, num_threads, tally, progress)
    tally.seconds = time.monotonic() - started
    return tally


def _open_sink(output: OutputFile, target: Path) -> Sink:
    path = target / output.name if output.name else target
    return ZipSink(path) if output.container == "zip" else RawSink(path)


def _write_record(records: tuple[Record, ...], sinks: Sequence[Sink], engine: Engine, pool: ThreadPoolExecutor,
                  num_threads: int, tally: Tally, progress: Callable[[int], None]) -> None:  # fmt: skip
    for sink, record in zip(sinks, records, strict=True):
        sink.begin(record.name, record.num_bytes)
    waiting: deque[Future[_Result]] = deque()
    jobs = (job for pieces in zip(*(record.pieces for record in records), strict=True) for job in _jobs(pieces, engine))
    try:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > num_threads * QUEUED_PER_THREAD:
                _take(waiting.popleft(), sinks, tally, progress)
        while waiting:
            _take(waiting.popleft(), sinks, tally, progress)
    finally:
        for future in waiting:
            future.cancel()


def _take(future: Future[_Result], sinks: Sequence[Sink], tally: Tally, progress: Callable[[int], None]) -> None:
    result = future.result()
    written = 0
    for sink, data in zip(sinks, result.data, strict=True):
        sink.write(memoryview(data.numpy()))
        written += data.numel()
    tally.bytes_read += result.bytes_read
    tally.bytes_written += written
    tally.num_forecast += result.num_forecast
    tally.unchanged = [a + b for a, b in zip(tally.unchanged, result.unchanged or [0] * len(sinks), strict=True)]
    progress(written)


# --- jobs: what a worker does ----------------------------------------------------------------------------------------


def _jobs(pieces: tuple[Piece, ...], engine: Engine) -> Iterator[Callable[[], _Result]]:
    """The work for one piece of every horizon's plan, in stretches."""
    first = pieces[0]
    if isinstance(first, Values):
        index = first.index
        num_snapshots = 1 if index is None else len(_snapshots_of(engine, index))
        itemsize = max(4, first.entry.dtype.itemsize)
        for stretch in stretches(first.entry.num_elements, num_snapshots=num_snapshots + engine.num_horizons,
                                 itemsize=itemsize):  # fmt: skip
            yield lambda stretch=stretch: _forecast_stretch(first, stretch, engine)  # type: ignore[misc]
    elif isinstance(first, Copy):
        for start in range(0, first.num_bytes, COPY_BYTES):
            count = min(COPY_BYTES, first.num_bytes - start)
            yield lambda start=start, count=count: _copy_stretch(first, start, count, engine)  # type: ignore[misc]
    else:
        yield lambda: _Result([_constant(piece) for piece in pieces])


def _constant(piece: Piece) -> torch.Tensor:
    if isinstance(piece, Literal_):
        return torch.frombuffer(bytearray(piece.data), dtype=torch.uint8) if piece.data else torch.empty(0, dtype=torch.uint8)
    assert isinstance(piece, Zeros)  # noqa: S101 - the plan's last kind
    return torch.zeros(piece.num_bytes, dtype=torch.uint8)


def _copy_stretch(piece: Copy, start: int, count: int, engine: Engine) -> _Result:
    raw = engine.reader.read_bytes(piece.path, piece.offset + start, count)
    return _Result([raw] * engine.num_horizons, bytes_read=count)


def _snapshots_of(engine: Engine, index: int) -> list[int]:
    """The snapshots that a tensor's forecasts read; only the origin where its step is zero."""
    linear = engine.linear
    needed = np.any(linear.weights[:, index] != 0, axis=0)
    needed[linear.origin] = True
    return [int(t) for t in np.flatnonzero(needed)]


def _forecast_stretch(piece: Values, stretch: Stretch, engine: Engine) -> _Result:
    linear, reader, work = engine.linear, engine.reader, _work_dtype(piece.entry)
    source = reader.read_values(piece.entry, stretch)
    num_read = source.nbytes
    last = source.to(engine.device, work)
    if piece.index is None:
        forecasts = [last] * engine.num_horizons
    else:
        tensor = engine.alignment.tensors[piece.index]
        used = [t for t in _snapshots_of(engine, piece.index) if t != linear.origin]
        moves = []
        for t in used:
            values = reader.read_values(tensor.entries[t], stretch)
            num_read += values.nbytes
            moves.append(values.to(engine.device, work) - last)
        forecasts = [
            _add_step(last, moves, linear.weights[h, piece.index, used], float(linear.gain[h, piece.index]),
                      float(linear.constant[h, piece.index]))
            for h in range(engine.num_horizons)
        ]  # fmt: skip
        forecasts = [_checked(values, last, moves, tensor, linear.origin, piece) for values in forecasts]
    data, unchanged = [], []
    for values in forecasts:
        kept = source if piece.index is None and piece.dtype is piece.entry.dtype else _cast(values, piece).cpu()
        data.append(kept.view(torch.uint8))
        unchanged.append(int((kept == source).sum()) if piece.index is not None else 0)
    return _Result(data, num_read, unchanged, stretch.count if piece.index is not None else 0)


def _work_dtype(entry: object) -> torch.dtype:
    return torch.float64 if entry.dtype.name == "float64" else torch.float32  # type: ignore[attr-defined]


def _add_step(last: torch.Tensor, moves: Sequence[torch.Tensor], weights: NDArray[np.float64], gain: float,
              constant: float) -> torch.Tensor:  # fmt: skip
    """w_s plus the step, elementwise, in a fixed order of operations (no fused multiply-add, which rounds otherwise).

    An element that is the same in all snapshots keeps its bits, -0.0 included.
    """
    step: torch.Tensor | None = None
    for move, weight in zip(moves, weights, strict=True):
        term = move * float(weight)
        step = term if step is None else step.add_(term)
    if step is None:
        step = torch.zeros_like(last)
    if gain or constant:
        moved = torch.zeros_like(last, dtype=torch.bool)
        for move in moves:
            moved |= move != 0
        step = torch.where(moved, step + last * gain + constant, 0.0)
    return torch.where(step == 0, last, last + step)


def _checked(values: torch.Tensor, last: torch.Tensor, moves: Sequence[torch.Tensor], tensor: AlignedTensor,
             origin: int, piece: Values) -> torch.Tensor:  # fmt: skip
    """Refuse NaN and infinity, but for elements that are the same infinity in every snapshot: those stay.

    Also keeps BatchNorm's variance from falling below zero.
    """
    low, high = torch.aminmax(values)
    limit = torch.finfo(getattr(torch, piece.dtype.name)).max
    if not (-limit <= float(low) and float(high) <= limit):
        values = _explain(values, last, moves, tensor, origin, limit)
    return values.clamp_min(0) if piece.non_negative else values


def _explain(values: torch.Tensor, last: torch.Tensor, moves: Sequence[torch.Tensor], tensor: AlignedTensor,
             origin: int, limit: float) -> torch.Tensor:  # fmt: skip
    """Which of the snapshots is not finite, or that the forecast leaves the range of its type."""
    entry = tensor.entries[origin]
    still = torch.isinf(last)
    for move in moves:  # inf - inf is NaN where the snapshots agree, infinite where they do not
        still &= torch.isnan(move)
    if bool((torch.isnan(last) | (torch.isinf(last) & ~still)).any()):
        raise non_finite(entry, last[~torch.isfinite(last)][0].item())
    for move in moves:
        bad = ~torch.isfinite(move) & ~still
        if bool(bad.any()):
            raise NonFiniteError(f"a snapshot before {entry.path}: tensor {entry.name!r} is not finite: expected finite numbers",
                                 hint="leave the snapshot out: farcast fit --steps A:B")  # fmt: skip
    kept = torch.where(still, torch.zeros_like(values), values)
    if not bool((kept.abs() <= limit).all()):
        raise SnapshotError(f"{entry.path}: the forecast of tensor {entry.name!r} leaves the range of its type (+-{limit:g})",
                            hint="--scale .5 takes a smaller step; --dtype float32 widens the range")  # fmt: skip
    return torch.where(still, last, values)


def _cast(values: torch.Tensor, piece: Values) -> torch.Tensor:
    return values.to(getattr(torch, piece.dtype.name))
