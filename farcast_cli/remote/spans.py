"""Which bytes of a file are here, and how those that are not are asked for in few requests."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Span = tuple[int, int]

JOINED_GAP = 64 << 10  # bytes: to fetch them takes about as long as one more request among many
MAX_REQUEST = 1 << 20  # bytes: with all requests in flight 64 MiB of memory


class Spans:
    """Bytes of a file as intervals [begin, end) that are apart and in order.

    >>> spans = Spans()
    >>> spans.add(0, 4); spans.add(8, 10); spans.missing(2, 12)
    [(4, 8), (10, 12)]
    >>> spans.add(4, 8); spans.missing(0, 10)
    []
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]

    def missing(self, begin: int, end: int) -> list[Span]:
        """The parts of [begin, end) that are not here."""
        found, index = list[tuple[int, int]](), bisect_right(self._ends, begin)
        while begin < end and index < len(self._begins) and self._begins[index] < end:
            if begin < self._begins[index]:
                found.append((begin, self._begins[index]))
            begin, index = self._ends[index], index + 1
        return [*found, (begin, end)] if begin < end else found


def requests(wanted: Iterable[Span]) -> Iterator[Span]:
    """Few requests that fetch all wanted bytes of a file, and perhaps small gaps between them; none is large.

    >>> list(requests([(200_000, 200_010), (0, 10), (20, 30)]))
    [(0, 30), (200000, 200010)]
    """
    joined = list[tuple[int, int]]()
    for begin, end in sorted(wanted):
        if joined and begin - joined[-1][1] <= JOINED_GAP:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    for begin, end in joined:
        for start in range(begin, end, MAX_REQUEST):
            yield start, min(end, start + MAX_REQUEST)
