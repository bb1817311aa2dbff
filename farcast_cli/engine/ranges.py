"""Ranges of output files, the tasks that workers take, and what must be brought together to fill one.

A range is a window of so many bytes of a file, whatever lies in it: a huge tensor is cut into many, and thousands of tiny
ones share one. What is computed comes in batches of segments, neighbours of one type that are read and computed at once.

Shapes: H horizons, N elements of a batch.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from farcast_cli.checkpoint.pieces import OutputFile, Piece, Values


@dataclass(frozen=True, slots=True)
class Placed:
    """The pieces of an output file by where they lie: piece i is bytes [starts[i], starts[i + 1]), of section `sections[i]`."""

    output: OutputFile
    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]
    sections: tuple[int, ...]

    @classmethod
    def of(cls, output: OutputFile) -> Placed:
        pieces, starts, sections = [], [0], []
        for number, section in enumerate(output.sections):
            for piece in section.pieces:
                pieces.append(piece)
                starts.append(starts[-1] + piece.num_bytes)
                sections.append(number)
        return cls(output, tuple(pieces), tuple(starts), tuple(sections))

    @property
    def num_bytes(self) -> int:
        return self.starts[-1]

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The pieces in a range: (number, first byte, byte after the last), bytes of the piece."""
        for number in range(bisect_right(self.starts, start) - 1, len(self.pieces)):
            begin, end = self.starts[number], self.starts[number + 1]
            if begin >= stop:
                return
            if max(begin, start) < min(end, stop):
                yield number, max(start - begin, 0), min(end, stop) - begin


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, stop) of output file number `file`."""

    file: int
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def ranges(files: Sequence[Placed], range_bytes: int) -> list[Range]:
    """All files in ranges, in order; an empty file has an empty range."""
    return [
        Range(number, start, min(start + range_bytes, file.num_bytes))
        for number, file in enumerate(files)
        for start in range(0, max(file.num_bytes, 1), range_bytes)
    ]


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [first, first + count) of a piece, and where in the range their bytes begin.

    Where a range cuts through an element, `at` is negative, or the last byte lies behind the range: a buffer has
    space for one element on either side of its range.
    """

    piece: Values
    first: int
    count: int
    at: int

    @property
    def end(self) -> int:
        return self.at + self.count * self.piece.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments that are computed at once."""

    segments: tuple[Segment, ...]
    count: int
    """Elements."""

    @property
    def piece(self) -> Values:
        """The first one's, whose types are those of all."""
        return self.segments[0].piece

    @property
    def is_in_place(self) -> bool:
        """Whether the output's bytes lie in the range in one stretch, and aligned."""
        size, first = self.piece.dtype.itemsize, self.segments[0].at
        return self.segments[-1].end - first == self.count * size and first % size == 0

    def parts(self, limit: int) -> Iterator[Batch]:
        """The same, a long segment in parts of up to `limit` elements."""
        if self.count <= limit or len(self.segments) > 1:
            yield self
            return
        (whole,) = self.segments
        for start in range(0, whole.count, limit):
            count = min(limit, whole.count - start)
            yield Batch(
                (Segment(whole.piece, whole.first + start, count, whole.at + start * whole.piece.dtype.itemsize),), count
            )


def segment_of(piece: Values, begin: int, end: int, at: int) -> Segment:
    """The elements that bytes [begin, end) of a piece touch; byte `begin` lies at `at` in the range."""
    size = piece.dtype.itemsize
    first, last = begin // size, -(-end // size)
    return Segment(piece, first, last - first, at - (begin - first * size))


def batches(segments: Iterable[Segment], kind: Callable[[Values], Hashable], limit: int) -> Iterator[Batch]:
    """Neighbours of one kind together, up to `limit` elements; a longer segment is one of its own."""
    held: list[Segment] = []
    count = 0
    for segment in segments:
        if held and (count + segment.count > limit or kind(segment.piece) != kind(held[0].piece)):
            yield Batch(tuple(held), count)
            held, count = [], 0
        held.append(segment)
        count += segment.count
    if held:
        yield Batch(tuple(held), count)
