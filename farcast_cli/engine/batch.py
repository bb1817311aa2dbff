"""Computes a batch of segments: reads them at every snapshot, adds the update, checks, rounds, and puts the bytes in place.

Shapes: K tensors, T snapshots, H horizons, N elements of a batch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.engine import native
from farcast_cli.engine.arithmetic import Coefficients, forecasts
from farcast_cli.engine.casts import MAX_FINITE, bits_of, has_negative_zeros, widen, work_type
from farcast_cli.engine.reader import Scratch, joined, non_finite
from farcast_cli.errors import SnapshotError
from farcast_cli.files.reading import reading_in_kernel

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    from farcast_cli.checkpoint.pieces import Values
    from farcast_cli.engine.arithmetic import Arithmetic, Array, Factor
    from farcast_cli.engine.linear import LinearMap
    from farcast_cli.engine.output_files import Buffer
    from farcast_cli.engine.ranges import Batch, Segment
    from farcast_cli.engine.reader import Reader
    from farcast_cli.files.reading import FileStretch
    from farcast_cli.run.alignment import AlignedTensor, Alignment
    from farcast_cli.tensors import TensorEntry

_FORECAST = "the forecast", "--scale .5 makes a smaller update; --dtype float32 has a larger range"
_TUNED = "a tuned value", "--ridge keeps the change small; --delta-out FILE keeps it in a separate file"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What forecasts are computed from: the aligned tensors of the snapshots that are read, and the map."""

    alignment: Alignment
    linear: LinearMap
    copies: tuple[AlignedTensor, ...] = ()
    """Second copies of the weights, numbered after the tensors of the alignment."""

    def others(self, piece: Values) -> tuple[int, ...]:
        """The snapshots other than the origin that a piece's forecast reads."""
        return () if piece.index is None else self.linear.others[piece.index]

    def entry(self, piece: Values, snapshot: int) -> TensorEntry:
        assert piece.index is not None  # noqa: S101 - only forecast tensors have other snapshots
        tensors = self.alignment.tensors
        tensor = tensors[piece.index] if piece.index < len(tensors) else self.copies[piece.index - len(tensors)]
        return tensor.entries[snapshot]

    def kind(self, piece: Values) -> Hashable:
        """What pieces have in common that are computed at once."""
        if piece.function is not None:
            return id(piece)
        others = self.others(piece)
        types = tuple(self.entry(piece, t).dtype.name for t in others)
        return piece.index is None, piece.entry.dtype.name, piece.dtype.name, piece.non_negative, others, types

    def stretch(self, segment: Segment, snapshot: int | None = None) -> FileStretch:
        """Where a segment lies in a snapshot, or in the origin where none is named."""
        piece = segment.piece
        entry = piece.entry if snapshot is None else self.entry(piece, snapshot)
        first = segment.first + (0 if snapshot is None else piece.begin)
        return entry.path, entry.offset + first * entry.dtype.itemsize, segment.count * entry.dtype.itemsize

    def stretches(self, segment: Segment) -> Iterator[FileStretch]:
        """All that is read for a segment."""
        yield self.stretch(segment)
        for snapshot in self.others(segment.piece):
            yield self.stretch(segment, snapshot)


@dataclass(frozen=True, slots=True)
class Counts:
    """What was read, written and left as it was, in a batch, a range or a whole pass; counts add up.

    An element that two ranges share is counted in both.

    Args:
        forecast: by horizon, elements that were forecast.
        unchanged: by horizon, those of them with the origin's own bits.
    """

    bytes_read: int = 0
    bytes_written: int = 0
    forecast: tuple[int, ...] = ()
    unchanged: tuple[int, ...] = ()
    seconds: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        def added(mine: tuple[int, ...], its: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(a + b for a, b in itertools.zip_longest(mine, its, fillvalue=0))

        return Counts(
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            added(self.forecast, other.forecast),
            added(self.unchanged, other.unchanged),
            self.seconds + other.seconds,
        )

    def of_horizons(self, horizons: Sequence[int], num_horizons: int) -> Counts:
        """The same, where these are some of several horizons."""

        def spread(numbers: tuple[int, ...]) -> tuple[int, ...]:
            of = dict(zip(horizons, numbers, strict=False))
            return tuple(of.get(index, 0) for index in range(num_horizons))

        return replace(self, forecast=spread(self.forecast), unchanged=spread(self.unchanged))

    def unchanged_share(self, index: int) -> float | None:
        """Of a horizon's forecast elements; None where nothing was forecast."""
        return self.unchanged[index] / self.forecast[index] if self.forecast and self.forecast[index] else None


class Compute:
    """Computes batches into buffers, of which there is one for each horizon; belongs to one worker."""

    def __init__(self, inputs: Inputs, arithmetic: Arithmetic, reader: Reader, *, block: int) -> None:
        self._inputs, self._arithmetic, self._reader, self._block = inputs, arithmetic, reader, block
        self._scratch = Scratch()
        self._bytes_read = 0
        self._held: tuple[object, Coefficients] | None = None
        self._held_update: tuple[Values, native.Update | None] | None = None

    @property
    def num_bytes(self) -> int:
        """The memory that it holds."""
        return self._scratch.num_bytes + self._arithmetic.num_bytes

    def compute(self, batch: Batch, buffers: Sequence[Buffer]) -> Counts:
        found = self._from_files(batch, buffers)
        if found is None:
            found = Counts()
            for part in batch.parts(self._block):
                found += self._from_memory(part, buffers) or self._by_arrays(part, buffers)
        return found

    def _from_files(self, batch: Batch, buffers: Sequence[Buffer]) -> Counts | None:
        """In the compiled kernel, which reads one stretch of each file itself; None likewise."""
        if self._arithmetic.kernel is None or len(batch.segments) > 1 or not batch.is_in_place:
            return None
        stretches = list(self._inputs.stretches(batch.segments[0]))
        if batch.piece.index is None or (sources := self._reader.for_kernel(stretches)) is None:
            return None
        self._bytes_read = sum(num_bytes for _, _, num_bytes in stretches)
        return self._by_kernel(batch, buffers, sources)

    def _from_memory(self, batch: Batch, buffers: Sequence[Buffer]) -> Counts | None:
        """In the compiled kernel; None where it does not serve, and where a result is not finite: arrays tell which one."""
        if self._arithmetic.kernel is None or self._update_of(batch) is None:
            return None
        self._bytes_read = 0
        others = enumerate(self._inputs.others(batch.piece))
        return self._by_kernel(
            batch, buffers, (self._read(batch, None), *(self._read(batch, t, f"other {number}") for number, t in others))
        )

    def _by_kernel(self, batch: Batch, buffers: Sequence[Buffer], sources: Sequence[native.Values]) -> Counts | None:
        """Of values of the origin and of the others."""
        kernel, update = self._arithmetic.kernel, self._update_of(batch)
        if kernel is None or update is None:
            return None
        outs = tuple(self._output(batch, buffer, f"out {horizon}") for horizon, buffer in enumerate(buffers))
        counts = np.array([segment.count for segment in batch.segments], np.int64)
        unchanged = np.zeros(len(outs), np.int64)
        non_negative, in_double = batch.piece.non_negative, work_type(batch.piece.entry.dtype) is np.float64
        with reading_in_kernel():
            is_finite = kernel.combine(
                tuple(sources[:1]),
                tuple(sources[1:]),
                outs,
                update.types,
                update.moves,
                update.bare,
                counts,
                update.weights,
                update.gains,
                unchanged,
                non_negative,
                in_double,
            )
        if not is_finite:
            return None
        for buffer, out in zip(buffers, outs, strict=True):
            self._deliver(batch, buffer, out)
        return Counts(self._bytes_read, 0, (batch.count,) * len(outs), tuple(unchanged.tolist()))

    def _by_arrays(self, batch: Batch, buffers: Sequence[Buffer]) -> Counts:
        """One operation after another, on whole arrays."""
        piece, arithmetic = batch.piece, self._arithmetic
        self._bytes_read = 0
        origin = self._read(batch, None)
        last = arithmetic.load(origin, piece.entry.dtype, "last", work_type(piece.entry.dtype))
        is_forecast, is_retyped = piece.index is not None, piece.dtype != piece.entry.dtype
        own = self._retyped(last, batch) if is_forecast and is_retyped else origin
        unchanged: list[int] = []
        for buffer, values in zip(buffers, self._values(batch, origin, last), strict=False):
            out = self._output(batch, buffer)
            self._store(values, batch, out)
            self._deliver(batch, buffer, out)
            unchanged.append(self._num_equal(out, own, batch) if is_forecast else 0)
        return Counts(self._bytes_read, 0, (batch.count * is_forecast,) * len(buffers), tuple(unchanged))

    def _num_equal(self, out: NDArray[np.uint8], own: NDArray[np.uint8], batch: Batch) -> int:
        """Elements whose bits are those of the origin."""
        dtype, equal = batch.piece.dtype, self._scratch.named("equal", batch.count, np.bool_)
        return int(np.count_nonzero(np.equal(bits_of(out, dtype), bits_of(own, dtype), out=equal)))

    def _values(self, batch: Batch, origin: NDArray[np.uint8], last: Array) -> Iterator[Array]:
        """The batch's values at every horizon; without end where they are the same at all."""
        piece, arithmetic = batch.piece, self._arithmetic
        if piece.function is not None:
            (segment,) = batch.segments
            own = np.array(arithmetic.to_host(last))  # a copy, which the function may change
            made = arithmetic.from_host(np.asarray(piece.function(own, piece.begin + segment.first), dtype=own.dtype))
            yield from itertools.repeat(made)
        elif piece.index is None:
            yield from itertools.repeat(last)
        else:
            others = (self._load(batch, snapshot) for snapshot in self._inputs.others(piece))
            keep_zeros = has_negative_zeros(origin, piece.entry.dtype)
            yield from forecasts(arithmetic, last, others, self._coefficients_of(batch), keep_zeros=keep_zeros)

    def _load(self, batch: Batch, snapshot: int) -> Array:
        dtype, work = self._inputs.entry(batch.piece, snapshot).dtype, work_type(batch.piece.entry.dtype)
        return self._arithmetic.load(self._read(batch, snapshot), dtype, "other", work)

    def _coefficients_of(self, batch: Batch) -> Coefficients:
        """The weights of a batch; those of a large tensor are the same from one to the next."""
        if len(batch.segments) > 1:
            return self._coefficients(batch)
        key = batch.piece.index, batch.piece.entry.dtype
        if self._held is None or self._held[0] != key:
            self._held = key, self._coefficients(batch)
        return self._held[1]

    def _coefficients(self, batch: Batch) -> Coefficients:
        """The weights of a batch, spread over its segments' elements."""
        linear, others, work = self._inputs.linear, self._inputs.others(batch.piece), work_type(batch.piece.entry.dtype)
        indices = np.array([segment.piece.index for segment in batch.segments], dtype=np.intp)
        counts = [segment.count for segment in batch.segments]

        def spread(numbers: NDArray[np.float64]) -> Factor:
            return self._arithmetic.spread(numbers[indices], counts, work)

        weights = [[spread(of[:, t]) for t in others] for of in linear.weights]
        moves = [t in linear.moves for t in others] if linear.moves else ()
        bare = [horizon in linear.bare for horizon in range(len(weights))] if linear.bare else ()
        if not (linear.gain[:, indices].any() or linear.constant[:, indices].any()):
            return Coefficients(weights, moves=moves, bare=bare)
        return Coefficients(weights, [spread(of) for of in linear.gain], [spread(of) for of in linear.constant], moves, bare)

    def _update_of(self, batch: Batch) -> native.Update | None:
        """The same for the kernel; None where it does not serve."""
        if len(batch.segments) > 1:
            return self._update(batch)
        if self._held_update is None or self._held_update[0] is not batch.piece:
            self._held_update = batch.piece, self._update(batch)
        return self._held_update[1]

    def _update(self, batch: Batch) -> native.Update | None:
        piece, linear, others = batch.piece, self._inputs.linear, self._inputs.others(batch.piece)
        if piece.index is None:
            return None
        types = native.codes([self._inputs.entry(piece, t).dtype for t in others], piece.entry.dtype, piece.dtype)
        if types is None:
            return None
        indices = np.array([segment.piece.index for segment in batch.segments], np.intp)
        gains = np.stack([linear.gain[:, indices].T, linear.constant[:, indices].T], axis=-1)
        return native.Update(
            types,
            bytes(t in linear.moves for t in others),
            bytes(horizon in linear.bare for horizon in range(len(linear.weights))),
            np.ascontiguousarray(linear.weights[:, indices][..., list(others)].transpose(1, 0, 2)),
            np.ascontiguousarray(gains) if gains.any() else None,
        )

    # --- bytes in and out ---------------------------------------------------------------------------------------------

    def _read(self, batch: Batch, snapshot: int | None, name: str = "other") -> NDArray[np.uint8]:
        """The batch's bytes at a snapshot, or at the origin as it lies there; neighbours in the file in one go."""
        stretches = joined(self._inputs.stretch(segment, snapshot) for segment in batch.segments)
        total = sum(num_bytes for _, _, num_bytes in stretches)
        memory = self._arithmetic.memory("origin" if snapshot is None else name, total)
        self._bytes_read += total
        if len(stretches) == 1:
            path, offset, _ = stretches[0]
            return self._reader.raw(path, offset, memory)
        position = 0
        for path, offset, num_bytes in stretches:
            self._reader.fill(path, offset, memory[position : position + num_bytes])
            position += num_bytes
        return memory

    def _output(self, batch: Batch, buffer: Buffer, name: str = "out") -> NDArray[np.uint8]:
        """Where a batch's bytes are made: in the range itself where they lie there in one aligned stretch."""
        num_bytes = batch.count * batch.piece.dtype.itemsize
        if batch.is_in_place:
            return buffer.at(batch.segments[0].at, num_bytes)
        return self._scratch.named(name, num_bytes, np.uint8)

    def _deliver(self, batch: Batch, buffer: Buffer, out: NDArray[np.uint8]) -> None:
        if batch.is_in_place:
            return
        position = 0
        for segment in batch.segments:
            num_bytes = segment.end - segment.at
            np.copyto(buffer.at(segment.at, num_bytes), out[position : position + num_bytes])
            position += num_bytes

    def _retyped(self, last: Array, batch: Batch) -> NDArray[np.uint8]:
        """The origin's values in the output's type."""
        out = self._scratch.named("retyped", batch.count * batch.piece.dtype.itemsize, np.uint8)
        self._arithmetic.store(last, batch.piece.dtype, out)
        return out

    # --- what must not be published -----------------------------------------------------------------------------------

    def _store(self, values: Array, batch: Batch, out: NDArray[np.uint8]) -> None:
        """Round values into their place. Refuses NaN and infinity, but for what every snapshot has.

        Also keeps BatchNorm's variance from falling below zero.
        """
        piece, arithmetic, xp = batch.piece, self._arithmetic, self._arithmetic.xp
        if piece.non_negative:
            values = xp.where((values < 0) & (values > -math.inf), xp.zeros_like(values), values)
        if arithmetic.store(values, piece.dtype, out):
            return
        host = arithmetic.to_host(values)
        is_constant, last = self._infinities(batch)
        if not arithmetic.store(arithmetic.from_host(np.where(is_constant, last.dtype.type(0), host)), piece.dtype, out):
            raise self._out_of_range(batch, out)
        arithmetic.store(arithmetic.from_host(np.where(is_constant, last, host)), piece.dtype, out)

    def _infinities(self, batch: Batch) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Which elements are infinite in every snapshot, or not finite where they are copied; and the origin's values.

        Rare, so everything is read again.

        Raises:
            NonFiniteError: a snapshot holds another value that is not finite.
        """
        snapshots = (None, *self._inputs.others(batch.piece))
        last, *others = (self._again(batch, snapshot) for snapshot in snapshots)
        if batch.piece.index is None and batch.piece.function is None:
            return ~np.isfinite(last), last
        is_constant = np.isinf(last)
        for other in others:
            is_constant &= other == last
        for snapshot, found in zip(snapshots, (last, *others), strict=True):
            if (bad := ~np.isfinite(found) & ~is_constant).any():
                at = int(bad.argmax())
                raise non_finite(self._entry_at(batch, at, snapshot), float(found[at]))
        return is_constant, last

    def _out_of_range(self, batch: Batch, out: NDArray[np.uint8]) -> SnapshotError:
        """The first element that rounding, or the forecast before it, left without a finite value."""
        dtype = batch.piece.dtype
        written = widen(out, dtype, np.empty(batch.count, work_type(dtype)))
        entry = self._entry_at(batch, int((~np.isfinite(written)).argmax()), None)
        what, hint = _FORECAST if batch.piece.function is None else _TUNED
        limit = f"+-{MAX_FINITE[dtype.name]:g}"
        return SnapshotError(f"{entry.path}: {what} of tensor {entry.name!r} leaves the range of its type ({limit})", hint=hint)

    def _again(self, batch: Batch, snapshot: int | None) -> NDArray[Any]:
        raw = self._read(batch, snapshot)
        dtype = (batch.piece.entry if snapshot is None else self._inputs.entry(batch.piece, snapshot)).dtype
        return np.array(widen(raw, dtype, np.empty(batch.count, work_type(batch.piece.entry.dtype))))

    def _entry_at(self, batch: Batch, element: int, snapshot: int | None) -> TensorEntry:
        """The tensor that an element of a batch belongs to."""
        for segment in batch.segments:
            if element < segment.count:
                return segment.piece.entry if snapshot is None else self._inputs.entry(segment.piece, snapshot)
            element -= segment.count
        raise AssertionError("an element outside of its batch")
