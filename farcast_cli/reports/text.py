"""The report as text: for a terminal of 44 columns, and as Markdown for the summary of a CI job."""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.errors import visible
from farcast_cli.forecast.timeline import evenly
from farcast_cli.reports.panels import facts, headline, panels, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.reports.panels import Numbers, Panel
    from farcast_cli.reports.story import Story

COLUMNS = 44
MAX_ROWS = 12  # of a table on a terminal
MIN_CELL = 8  # characters of the first column that are left at least
SHADES = ((0.45, "██"), (0.25, "▓▓"), (0.1, "▒▒"), (-0.1, "  "), (-2.0, "--"))
"""Of a cosine, by the smallest that each stands for."""
PLAIN_SHADES = ((0.45, "##"), (0.25, "++"), (0.1, "::"), (-0.1, "  "), (-2.0, "--"))
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


# --- a terminal ------------------------------------------------------------------------------------------------------


def terminal(story: Story, *, is_plain: bool = False) -> str:
    """The report in lines of at most 44 columns.

    Args:
        is_plain: in ASCII, for a stream that takes no other characters.
    """
    text = "\n".join(_terminal(story, is_plain=is_plain)) + "\n"
    return text.encode("ascii", "replace").decode() if is_plain else text


def _terminal(story: Story, *, is_plain: bool) -> Iterator[str]:
    said = headline(story)
    yield from _filled(f"farcast report: {short_name(story)}, {story.fitted.rule.unit} {story.fitted.steps[-1]}")
    yield ""
    yield from _filled(said.title.upper())
    yield from _filled(said.why)
    yield from _filled(said.sure)
    for name, value, remark in said.figures:
        yield from _filled(f"  {name:<14} {value:>7}  {remark}")
    yield from _filled(f"next: {said.next_step}", indent="  ")
    for panel in panels(story):
        yield from ("", *_filled(panel.title.upper()), *_filled(panel.message))
        if panel.name == "moves":
            yield from _heat_map(story, PLAIN_SHADES if is_plain else SHADES)
        elif panel.table.rows:
            yield from _filled(panel.reading)
            yield from _columns(panel.table)
    yield from ("", "THE RUN IN FACTS")
    for name, value in facts(story):
        yield from _filled(f"{name}: {value}", indent="  ")


def _filled(text: str, *, indent: str = "") -> list[str]:
    """A text in lines; those after the first are indented."""
    return textwrap.wrap(visible(text), COLUMNS, subsequent_indent=indent, break_on_hyphens=False) if text else []


def _heat_map(story: Story, shades: Sequence[tuple[float, str]]) -> Iterator[str]:
    """The cosines, two characters a cell, and how to read them."""
    cosines = story.moves.cosines
    keep = evenly(len(cosines), COLUMNS // 2)
    if len(keep) < len(cosines):
        yield from _filled(f"{len(keep)} of {len(cosines)} moves, evenly chosen:")
    for row in keep:
        yield "".join(".." if row == column else _shade(float(cosines[row, column]), shades) for column in keep).rstrip()
    marks = {mark: f"{mark} {least:g} or more" for least, mark in shades[:3]}
    yield from _filled(", ".join(marks.values()) + ", -- below -0.1")
    yield from _filled("all dark: leap far; a dark band along the diagonal: leap a short way; pale: do not leap")


def _shade(cosine: float, shades: Sequence[tuple[float, str]]) -> str:
    return next(mark for least, mark in shades if cosine >= least) if math.isfinite(cosine) else "  "


def _columns(table: Numbers) -> Iterator[str]:
    """A table in columns: of many rows some, of a long name its ends."""
    rows = [[visible(cell) for cell in row] for row in table.rows]
    shown = [table.headings, *(rows[index] for index in evenly(len(rows), MAX_ROWS))]
    widths = [max(len(row[place]) for row in shown) for place in range(len(table.headings))]
    others = sum(widths[1:]) + 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(MIN_CELL, COLUMNS - others))
    for row in shown:
        cells = [_cut(row[0], widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells)[:COLUMNS].rstrip()
    if len(rows) > MAX_ROWS:
        yield f"({MAX_ROWS} of {len(rows)} rows, evenly chosen)"


def _cut(text: str, width: int) -> str:
    """A text of a width; one that is too long loses its middle."""
    keep = width - 2
    return text.ljust(width) if len(text) <= width else f"{text[: keep - keep // 2]}..{text[len(text) - keep // 2 :]}"


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(story: Story) -> str:
    """The report without pictures, for a CI job's summary."""
    said = headline(story)
    parts = [
        f"# {_inert(said.title)}",
        f"{_inert(said.why)} {_inert(said.sure)}".strip(),
        *([_rows(("number", "value", "limit"), said.figures)] if said.figures else []),
        f"Next: {_inert(said.next_step)}",
        *(part for panel in panels(story) for part in _panel(panel)),
        "## The run in facts",
        _rows(("what", "value"), facts(story)),
        f"farcast {__version__}, run {_inert(short_name(story))}, {story.fitted.rule.unit} {story.fitted.steps[-1]}",
    ]
    return "\n\n".join(parts) + "\n"


def _panel(panel: Panel) -> Iterator[str]:
    yield f"## {_inert(panel.title)}"
    yield _inert(panel.message)
    if panel.table.rows:
        yield _inert(panel.reading)
        yield _rows(panel.table.headings, panel.table.rows)


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*text, *(f"| {' | '.join(map(_inert, row))} |" for row in rows)])


def _inert(text: str) -> str:
    """A text that Markdown shows as it is: no markup, no HTML, no mention of anybody."""
    return _SPECIAL.sub(r"\\\1", visible(text)).replace("@", "&#64;").replace("://", ":&#47;&#47;")
