"""One worker: fills ranges of the output and writes them.

Knows how pieces become bytes of a range. Its memory is two ranges for each horizon and a few blocks of a batch, whatever the
model's size and the number of snapshots.

Shapes: K tensors, T snapshots, H horizons.
"""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.checkpoint.plan import Copy, Fixed, Values
from farcast_cli.engine.batch import Compute
from farcast_cli.engine.output_files import Buffer, OutputFiles
from farcast_cli.engine.ranges import batches, segment_of
from farcast_cli.engine.reader import Reader

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from farcast_cli.choices import Io
    from farcast_cli.engine.arithmetic import Arithmetic
    from farcast_cli.engine.batch import Inputs
    from farcast_cli.engine.ranges import Placed, Range, Segment

_PREFETCHED = 64 << 10  # bytes that are worth a hint to the kernel


Checksum = tuple[int, int, int]
"""Of a record: the first byte in its file, bytes, CRC-32."""


@dataclass(frozen=True, slots=True)
class Work:
    """What all workers of a pass share.

    Args:
        files: the output's files, for each horizon; they differ in fixed bytes alone.
        paths: where they are written, for each horizon.
        ranges: the tasks.
        block: elements of a batch.
        ahead: how many ranges further on is read ahead; 0 for never.
    """

    source: Inputs
    files: Sequence[Sequence[Placed]]
    paths: Sequence[Sequence[Path]]
    ranges: Sequence[Range]
    io: Io
    block: int
    ahead: int = 0

    @property
    def num_horizons(self) -> int:
        return len(self.files)

    @property
    def range_bytes(self) -> int:
        return max((one.num_bytes for one in self.ranges), default=0)


@dataclass(slots=True)
class Report:
    """What filling one range took; `checksums` are (horizon, file, record, part)."""

    number: int
    num_bytes: int
    bytes_read: int = 0
    num_forecast: int = 0
    unchanged: list[int] = field(default_factory=list)
    checksums: list[tuple[int, int, int, Checksum]] = field(default_factory=list)


class Worker:
    """Fills ranges; belongs to one process or thread. While one range is computed, the last one is being written."""

    def __init__(self, work: Work, arithmetic: Arithmetic) -> None:
        self._work, self._arithmetic = work, arithmetic
        self._reader, self._target = Reader(work.io), OutputFiles(work.io)
        self._rooms, self._other_rooms = ([Buffer(work.range_bytes) for _ in range(work.num_horizons)] for _ in range(2))
        self._computer = Compute(work.source, arithmetic, self._reader)
        self._writer = ThreadPoolExecutor(1)
        self._being_written: Future[None] | None = None

    def fill(self, number: int) -> Report:
        """Read and compute range `number`, and begin to write it.

        Raises:
            OSError: the range before it could not be written; `close` tells of the last one.
        """
        report = self.make(number)
        self._wait()
        self._being_written = self._writer.submit(self._write, number, self._rooms)
        self._rooms, self._other_rooms = self._other_rooms, self._rooms
        return report

    def _write(self, number: int, rooms: Sequence[Buffer]) -> None:
        one = self._work.ranges[number]
        for paths, files, room in zip(self._work.paths, self._work.files, rooms, strict=True):
            self._target.write(paths[one.file], one.start, room, one.num_bytes, file_bytes=files[one.file].num_bytes)

    def _wait(self) -> None:
        if self._being_written is not None:
            being_written, self._being_written = self._being_written, None
            being_written.result()

    def make(self, number: int) -> Report:
        """Read and compute range `number`, and leave it in memory."""
        work, one = self._work, self._work.ranges[number]
        report = Report(number, one.num_bytes * work.num_horizons, unchanged=[0] * work.num_horizons)
        self._read_ahead(number + work.ahead)
        with self._arithmetic.lane():
            for batch in batches(self._segments(one, report), work.source.kind, work.block):
                done = self._computer.compute(batch, self._rooms)
                report.bytes_read += done.bytes_read
                report.num_forecast += done.num_forecast
                report.unchanged = [a + b for a, b in zip(report.unchanged, done.unchanged, strict=True)]
        self._reader.release()
        self._sum_up(one, report)
        return report

    @property
    def num_bytes(self) -> int:
        """The memory that it holds."""
        return self._computer.num_bytes + sum(room.num_bytes for room in (*self._rooms, *self._other_rooms))

    def close(self) -> None:
        """Wait for the last range to be written.

        Raises:
            OSError: it could not be.
        """
        try:
            self._wait()
        finally:
            self._writer.shutdown()
            self._target.close()

    def _segments(self, one: Range, report: Report) -> Iterator[Segment]:
        """What is to be computed in a range; everything else is put there on the way."""
        file = self._work.files[0][one.file]
        for number, begin, end in file.within(one.start, one.stop):
            piece, at = file.pieces[number], file.starts[number] + begin - one.start
            if isinstance(piece, Values):
                yield segment_of(piece, begin, end, at)
            elif isinstance(piece, Copy):
                self._copy(piece.path, piece.offset + begin, at, end - begin)
                report.bytes_read += end - begin
            else:
                self._put(one.file, number, begin, end, at)

    def _copy(self, path: Path, offset: int, at: int, num_bytes: int) -> None:
        first, *others = (room.at(at, num_bytes) for room in self._rooms)
        self._reader.fill(path, offset, first)
        for other in others:
            np.copyto(other, first)

    def _put(self, file: int, number: int, begin: int, end: int, at: int) -> None:
        """Bytes that were known in advance, or zeros."""
        for files, room in zip(self._work.files, self._rooms, strict=True):
            piece = files[file].pieces[number]
            known = np.frombuffer(piece.data, np.uint8)[begin:end] if isinstance(piece, Fixed) else 0
            room.at(at, end - begin)[...] = known

    def _sum_up(self, one: Range, report: Report) -> None:
        """The checksums of what the range holds of each record that has one."""
        for horizon, (files, room) in enumerate(zip(self._work.files, self._rooms, strict=True)):
            file = files[one.file]
            for number, begin, end in file.within(one.start, one.stop):
                record = file.records[number]
                if file.output.records[record].checksums_at:
                    start = file.starts[number] + begin
                    checksum = zlib.crc32(room.at(start - one.start, end - begin).data)
                    report.checksums.append((horizon, one.file, record, (start, end - begin, checksum)))

    def _read_ahead(self, number: int) -> None:
        """Have the kernel read what a range needs that will be filled soon, while this one is computed."""
        if not self._work.ahead or number >= len(self._work.ranges):
            return
        one = self._work.ranges[number]
        file = self._work.files[0][one.file]
        for index, begin, end in file.within(one.start, one.stop):
            piece = file.pieces[index]
            if end - begin < _PREFETCHED:
                continue
            if isinstance(piece, Copy):
                self._reader.prefetch(piece.path, piece.offset + begin, end - begin)
            elif isinstance(piece, Values):
                for stretch in self._work.source.stretches(segment_of(piece, begin, end, 0)):
                    self._reader.prefetch(*stretch)
