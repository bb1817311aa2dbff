"""Tables that fit the terminal: on a narrow one, columns are left out or replaced, and long names are cut or take several lines."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

GAP = 2  # columns between two columns
LEAST_NAME = 24  # a name is cut to this width before the table loses a column
BAR_WIDTH = 20
TO_ONE = 13  # of a bar: up to the mark at 1; then the mark, and what is above 1
ABOVE_ONE = BAR_WIDTH - TO_ONE - 2


@dataclass(frozen=True, slots=True)
class Column:
    """A heading with a text for each row."""

    heading: str
    cells: tuple[Text, ...]
    justify: Literal["left", "right"] = "left"
    least: int | None = None
    """The width to which its texts may be cut; None if they may not."""
    instead: tuple[Column, ...] = ()
    """What stands in its place where it does not fit: a shorter column, or none."""
    rank: int = 0
    """The columns of the lowest rank above 0 give way first; those of rank 0 stay."""
    folds_at: int | None = None
    """The width of a line of its texts, where they take several."""

    @property
    def width(self) -> int:
        return max(cell_len(self.heading), *(cell_len(cell.plain) for cell in self.cells), 0)

    @property
    def least_width(self) -> int:
        return self.width if self.least is None else min(self.width, max(self.least, cell_len(self.heading)))


def fitted_table(columns: Iterable[Column], width: int) -> Table:
    """A table no wider than the terminal, if that can be."""
    shown = _fitting(tuple(columns), width)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in shown:
        folds = column.folds_at is not None
        table.add_column(column.heading, justify=column.justify, width=column.folds_at, no_wrap=not folds, overflow="fold")
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*row)
    return table


def _fitting(columns: tuple[Column, ...], width: int) -> Sequence[Column]:
    """As many of the columns as fit, with their names cut; a column gives way before a name is folded."""
    ranks = sorted({column.rank for column in columns if column.rank})
    least = sum(column.least_width for column in columns) + GAP * (len(columns) - 1)
    shown = _cut(columns, width)
    if not ranks or (least <= width and all(column.folds_at is None for column in shown)):
        return shown
    kept = [column.instead if column.rank == ranks[0] else (column,) for column in columns]
    return _fitting(tuple(column for some in kept for column in some), width)


def _cut(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns with their names cut, so that together they are no wider than that."""
    over = sum(column.width for column in columns) + GAP * (len(columns) - 1) - width
    found = []
    for column in columns:
        less = max(0, min(over, column.width - column.least_width))
        over -= less
        found.append(_narrowed(column, column.width - less) if less else column)
    return found


def _narrowed(column: Column, width: int) -> Column:
    """Its texts cut as near to the middle as leaves them different; folded where no cut does."""
    names = [cell.plain for cell in column.cells]
    middle = (width - 2) // 2
    for begin in sorted(range(width - 2), key=lambda begin: abs(begin - middle)):
        cut = [cut_in_the_middle(name, width, begin=begin) for name in names]
        if len(set(cut)) == len(set(names)):
            return replace(column, cells=_styled(cut, column))
    return replace(column, cells=_styled([_folded(name, width) for name in names], column), folds_at=width)


def _styled(texts: Sequence[str], column: Column) -> tuple[Text, ...]:
    """Texts in the styles of a column's."""
    return tuple(Text(text, style=cell.style) for text, cell in zip(texts, column.cells, strict=True))


def _folded(name: str, width: int) -> str:
    r"""A name in lines that end with a dot or a slash; a word that is longer than a line stays for the table to fold.

    >>> _folded("model.layers.10.mlp.weight", 13)
    'model.layers.\n10.mlp.weight'
    """
    lines = [""]
    for word in re.split(r"(?<=[./])", name):
        if cell_len(lines[-1] + word) > width and lines[-1]:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def cut_in_the_middle(text: str, width: int, *, begin: int | None = None) -> str:
    """A text with both its ends, where it is too long: names differ at their ends.

    Args:
        begin: how much of the width is for its beginning; about half of it if not given.

    >>> cut_in_the_middle("layers.10.mlp.weight", 12), cut_in_the_middle("short", 12)
    ('layer...ight', 'short')
    >>> cut_in_the_middle("layers.10.mlp.weight", 12, begin=9)
    'layers.10...'
    """
    if cell_len(text) <= width:
        return text
    first = _beginning(text, (width - 2) // 2 if begin is None else begin)
    return f"{first}...{_beginning(text[::-1], width - 3 - cell_len(first))[::-1]}"


def _beginning(text: str, width: int) -> str:
    """The longest beginning that is no wider; some characters are two columns wide."""
    text = text[:width]
    while cell_len(text) > width:
        text = text[:-1]
    return text


def bar(ratio: float, *, is_utf: bool = True) -> str:
    """A ratio as a bar with a mark at 1, 'no better than nothing'; what is longer than the bar ends with `>`.

    >>> bar(0.43), bar(1.0), bar(1.1), bar(3.0, is_utf=False)
    ('██████·······│······', '█████████████│······', '█████████████│██····', '#############|#####>')
    """
    full, empty, mark = ("█", "·", "│") if is_utf else ("#", ".", "|")
    ratio = 0.0 if math.isnan(ratio) else min(max(ratio, 0.0), 2.0)
    below, above = min(round(ratio * TO_ONE), TO_ONE), math.ceil(max(ratio - 1, 0) * TO_ONE)
    end = full * min(above, ABOVE_ONE) + (">" if above > ABOVE_ONE else empty)
    return full * below + empty * (TO_ONE - below) + mark + end.ljust(ABOVE_ONE + 1, empty)
