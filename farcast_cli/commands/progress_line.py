"""The line on a terminal that shows how far a phase is: which of its columns a terminal has place for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.progress import Task

BYTES_AND_TIME = 23  # columns of these numbers, with the blank before each
WITH_RATE = 66  # columns of a line that has the rate, but no bar
LEAST_BAR, MOST_BAR = 10, 40


class _BySize(ProgressColumn):
    """A column of the phases of known length, and another one, or none, of the others."""

    def __init__(self, known: ProgressColumn, unknown: ProgressColumn | None = None) -> None:
        super().__init__(Column(no_wrap=True))
        self._known, self._unknown = known, unknown

    def render(self, task: Task) -> RenderableType:
        column = self._unknown if task.total is None else self._known
        return column(task) if column else ""


def columns_for(width: int) -> Iterator[ProgressColumn]:
    """Name, bar, bytes, rate and time left of a phase, in one line: on a narrow terminal the bar gives way, then the rate."""
    yield TextColumn("{task.description}", table_column=Column(no_wrap=True, max_width=max(1, width - BYTES_AND_TIME)))
    if width >= WITH_RATE + LEAST_BAR:
        yield BarColumn(bar_width=min(MOST_BAR, width - WITH_RATE))
    yield _BySize(DownloadColumn())
    if width >= WITH_RATE:
        yield _BySize(TransferSpeedColumn())
    yield _BySize(TimeRemainingColumn(), TimeElapsedColumn())
