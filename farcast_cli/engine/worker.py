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

from farcast_cli.checkpoint.pieces import Copy, Fixed, Values
from farcast_cli.engine.batch import Compute, Counts
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
"""Of a stretch of a section: the first byte in its file, bytes, CRC-32."""


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

    inputs: Inputs
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
class Filled:
    """What came of a range; `checksums` are (horizon, file, section, that of a stretch)."""

    number: int
    counts: Counts
    checksums: list[tuple[int, int, int, Checksum]] = field(default_factory=list)


class Worker:
    """Fills ranges; belongs to one process or thread. While one range is computed, the last one is being written."""

    def __init__(self, work: Work, arithmetic: Arithmetic) -> None:
        self._work, self._arithmetic = work, arithmetic
        self._reader, self._output_files = Reader(work.io), OutputFiles(work.io)
        self._buffers, self._other_buffers = ([Buffer(work.range_bytes) for _ in range(work.num_horizons)] for _ in range(2))
        self._compute = Compute(work.inputs, arithmetic, self._reader, block=work.block)
        self._writer = ThreadPoolExecutor(1)
        self._being_written: Future[None] | None = None

    def fill(self, number: int) -> Filled:
        """Read and compute range `number`, and begin to write it.

        Raises:
            OSError: the range before it could not be written; `close` tells of the last one.
        """
        filled = self.make(number)
        self._wait()
        self._being_written = self._writer.submit(self._write, number, self._buffers)
        self._buffers, self._other_buffers = self._other_buffers, self._buffers
        return filled

    def _write(self, number: int, buffers: Sequence[Buffer]) -> None:
        one = self._work.ranges[number]
        for paths, files, buffer in zip(self._work.paths, self._work.files, buffers, strict=True):
            self._output_files.write(paths[one.file], one.start, buffer, one.num_bytes, file_bytes=files[one.file].num_bytes)

    def _wait(self) -> None:
        if self._being_written is not None:
            being_written, self._being_written = self._being_written, None
            being_written.result()

    def make(self, number: int) -> Filled:
        """Read and compute range `number`, and leave it in memory."""
        work, one = self._work, self._work.ranges[number]
        self._read_ahead(number + work.ahead)
        counts = Counts(self._fill_in(one), one.num_bytes * work.num_horizons)
        with self._arithmetic.context():
            for batch in batches(self._segments(one), work.inputs.kind, work.block):
                counts += self._compute.compute(batch, self._buffers)
        self._reader.release()
        return Filled(number, counts, list(self._checksums(one)))

    @property
    def num_bytes(self) -> int:
        """The memory that it holds."""
        return self._compute.num_bytes + sum(buffer.num_bytes for buffer in (*self._buffers, *self._other_buffers))

    def close(self) -> None:
        """Wait for the last range to be written.

        Raises:
            OSError: it could not be.
        """
        try:
            self._wait()
        finally:
            self._writer.shutdown()
            self._output_files.close()

    def _fill_in(self, one: Range) -> int:
        """Put everything in its place that is not computed; returns the bytes that were read for it."""
        file, bytes_read = self._work.files[0][one.file], 0
        for number, begin, end in file.within(one.start, one.stop):
            piece, at = file.pieces[number], file.starts[number] + begin - one.start
            if isinstance(piece, Copy):
                self._copy(piece.path, piece.offset + begin, at, end - begin)
                bytes_read += end - begin
            elif not isinstance(piece, Values):
                self._put(one.file, number, begin, end, at)
        return bytes_read

    def _segments(self, one: Range) -> Iterator[Segment]:
        """What is to be computed in a range."""
        file = self._work.files[0][one.file]
        for number, begin, end in file.within(one.start, one.stop):
            if isinstance(piece := file.pieces[number], Values):
                yield segment_of(piece, begin, end, file.starts[number] + begin - one.start)

    def _copy(self, path: Path, offset: int, at: int, num_bytes: int) -> None:
        first, *others = (buffer.at(at, num_bytes) for buffer in self._buffers)
        self._reader.fill(path, offset, first)
        for other in others:
            np.copyto(other, first)

    def _put(self, file: int, number: int, begin: int, end: int, at: int) -> None:
        """Bytes that were known in advance, or zeros."""
        for files, buffer in zip(self._work.files, self._buffers, strict=True):
            piece = files[file].pieces[number]
            known = np.frombuffer(piece.data, np.uint8)[begin:end] if isinstance(piece, Fixed) else 0
            buffer.at(at, end - begin)[...] = known

    def _checksums(self, one: Range) -> Iterator[tuple[int, int, int, Checksum]]:
        """Of what the range holds of each section that has a checksum."""
        for horizon, (files, buffer) in enumerate(zip(self._work.files, self._buffers, strict=True)):
            file = files[one.file]
            for number, begin, end in file.within(one.start, one.stop):
                section = file.sections[number]
                if file.output.sections[section].checksums_at:
                    start = file.starts[number] + begin
                    checksum = zlib.crc32(buffer.at(start - one.start, end - begin).data)
                    yield horizon, one.file, section, (start, end - begin, checksum)

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
                for stretch in self._work.inputs.stretches(segment_of(piece, begin, end, 0)):
                    self._reader.prefetch(*stretch)
