"""The pictures of a report, by matplotlib: one function for each panel, for a page (SVG) and for one tall picture (PNG).

All lengths are in points; a page shows one point as one pixel or a little less, so that a text of 12 points can be read on a
phone. Colours are Okabe and Ito's, which people with a colour-blind eye can tell apart; lines differ by marker and dash as well.
"""

from __future__ import annotations

import io
import math
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from farcast_cli.errors import visible
from farcast_cli.reports.panels import CASES, NO_VALUE, headline, panels, short_name, shown_methods, shown_tensors
from farcast_cli.run.losses import LOSS_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from farcast_cli.forecast.judgement import TensorError
    from farcast_cli.reports.panels import Panel
    from farcast_cli.reports.story import Story


LIGHT = {
    "ground": "#ffffff",
    "ink": "#1c2530",
    "muted": "#5a6672",
    "rule": "#d4dae0",
    "zone": "#eceff2",
    "blue": "#0072b2",
    "warm": "#d55e00",
    "green": "#009e73",
    "pink": "#b8578c",
}
"""The colours by name, on white. A page replaces each by a variable, so that it can be dark as well."""
DARK = {
    "ground": "#12161b",
    "ink": "#e8ecf0",
    "muted": "#9fabb7",
    "rule": "#39434e",
    "zone": "#222931",
    "blue": "#56b4e9",
    "warm": "#ff8a4a",
    "green": "#2fc79c",
    "pink": "#e79cc6",
}
WIDTH = 400.0
COLUMNS = (("moves", "backtest", "course"), ("directions", "tensors"))
"""Of the picture, as on a wide page."""
MARGIN, HEAD, TITLE = 40.0, 258.0, 84.0  # of the picture: between its parts, of the headline, of a panel's title and message
TITLE_LINES, LINE = 4, 15.0  # of a message in that height, and the height of one more
MAX_LINE = 64  # characters of a panel's message
DPI = 108
MAX_MARKED = 40  # points of a line: more markers would touch
LEFT, RIGHT = 52.0, 14.0
TEXT, SMALL = 12.5, 12.0
ROW = 33.0  # of a bar with its name above it
MAX_NAME = 54  # characters of a tensor's name
GAMMA = 0.7  # of a cosine's shade: .1 and .3 are what real runs have, and must not look alike
MAX_RATIO = 2.0  # that a back-test's axis reaches; the table has what lies beyond
MIN_P = 1e-3  # at which the axis of p ends; the sign patterns give a p of .002 at least
ABOVE = 1.5  # times the limit, the zone begins: with few snapshots p often equals it, and is allowed
LINES = (("blue", "-", "o"), ("warm", "--", "s"), ("green", "-.", "^"), ("pink", (0, (4, 1, 1, 1, 1, 1)), "D"))
"""Of methods, in order: colour, dash, marker."""
STYLE: Any = {
    "font.size": TEXT,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "svg.hashsalt": "farcast",
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.4,
    "legend.borderaxespad": 0.0,
    "path.simplify": False,
    "text.parse_math": False,
}


@dataclass(frozen=True, slots=True)
class Sheet:
    """A part of a figure that one panel is drawn on; all lengths in points, from the top left corner of the figure."""

    figure: Figure
    height: float
    left: float = 0.0
    top: float = 0.0

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes by their distances from the sheet's edges."""
        whole = self.figure.get_size_inches() * 72
        low = whole[1] - self.top - self.height + bottom
        size = WIDTH - left - right, self.height - bottom - top
        return self.figure.add_axes(((self.left + left) / whole[0], low / whole[1], size[0] / whole[0], size[1] / whole[1]))

    def write(self, left: float, top: float, text: str, **style: Any) -> None:
        """A text by its distances from the sheet's corner."""
        whole = self.figure.get_size_inches() * 72
        place = (self.left + left) / whole[0], 1 - (self.top + top) / whole[1]
        self.figure.text(*place, visible(text), va="center", **style)


def figures(story: Story) -> dict[str, str]:
    """The SVG of each panel that has something to draw, by the panel's name."""
    found = {}
    for panel in _drawn(story):
        with _styled():
            height = _height(panel.name, story)
            figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
            DRAW[panel.name](Sheet(figure, height), story)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        found[panel.name] = text.getvalue()
    return found


def picture(story: Story, *, software: str) -> bytes:
    """All panels in two columns under the headline, as a PNG.

    Args:
        software: what the file says of who wrote it.
    """
    with _styled():
        return _png(poster(story), software)


def poster(story: Story) -> Figure:
    """All panels in two columns under the headline."""
    known = {panel.name: panel for panel in _drawn(story)}
    columns = [[known[name] for name in names if name in known] for names in COLUMNS]
    height = HEAD + max(sum(_placed_height(panel, story) for panel in column) for column in columns)
    figure = Figure(figsize=((2 * WIDTH + 3 * MARGIN) / 72, height / 72), dpi=DPI, facecolor=LIGHT["ground"])
    _draw_head(Sheet(figure, HEAD, MARGIN), story)
    for place, column in enumerate(columns):
        top = HEAD
        for panel in column:
            _draw_panel(Sheet(figure, _title_height(panel), MARGIN + place * (WIDTH + MARGIN), top), panel, story)
            top += _placed_height(panel, story)
    return figure


@contextmanager
def _styled() -> Iterator[None]:
    """Matplotlib's own defaults and our style, whatever the user's settings are: a report looks the same everywhere."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def _png(figure: Figure, software: str) -> bytes:
    raw = io.BytesIO()
    figure.savefig(raw, format="png", metadata={"Software": software}, pil_kwargs={"optimize": True})
    return raw.getvalue()


def _placed_height(panel: Panel, story: Story) -> float:
    return _title_height(panel) + _height(panel.name, story) + MARGIN


def _title_height(panel: Panel) -> float:
    """Of a panel's title and its message: as many lines as that takes."""
    return TITLE + LINE * max(0, len(_message_lines(panel)) - TITLE_LINES)


def _message_lines(panel: Panel) -> list[str]:
    cases = f" {'; '.join(CASES).capitalize()}." if panel.name == "moves" else ""
    return textwrap.wrap(panel.message + cases, MAX_LINE)


def _draw_panel(sheet: Sheet, panel: Panel, story: Story) -> None:
    """A panel of the picture: its title and its message on a sheet, its figure below."""
    sheet.write(0, 8, panel.title, fontsize=14.5, weight="bold")
    for line, text in enumerate(_message_lines(panel)):
        sheet.write(0, 28 + LINE * line, text, fontsize=SMALL, color=LIGHT["muted"])
    DRAW[panel.name](Sheet(sheet.figure, _height(panel.name, story), sheet.left, sheet.top + sheet.height), story)


def _drawn(story: Story) -> list[Panel]:
    return [panel for panel in panels(story) if panel.table.rows]


def _draw_head(sheet: Sheet, story: Story) -> None:
    said = headline(story)
    kicker = f"farcast report · {short_name(story)} · {story.fitted.rule.unit} {story.fitted.steps[-1]}"
    sheet.write(0, 36, kicker, fontsize=TEXT, color=LIGHT["muted"])
    sheet.write(0, 78, said.title, fontsize=40, weight="bold")
    for line, (text, colour) in enumerate(((said.why, "ink"), (said.sure, "muted"))):
        sheet.write(0, 124 + 22 * line, text, fontsize=15, color=LIGHT[colour])
    for column, (name, value, remark) in enumerate(said.figures):
        sheet.write(150 * column, 182, name, fontsize=SMALL, color=LIGHT["muted"])
        sheet.write(150 * column, 202, value, fontsize=20)
        sheet.write(150 * column, 221, remark, fontsize=SMALL, color=LIGHT["muted"])


def _height(name: str, story: Story) -> float:
    most, least = shown_tensors(story)
    bars = ROW * (len(most) + len(least)) + (14 if least else 0) + 48
    return {"moves": 418.0, "directions": 360.0, "backtest": 330.0, "tensors": bars, "course": 250.0}[name]


# --- cosines ---------------------------------------------------------------------------------------------------------


def _draw_moves(sheet: Sheet, story: Story) -> None:
    moves = story.moves
    side = WIDTH - LEFT - RIGHT
    height = sheet.height
    axes = sheet.axes(LEFT, height - side - 6, RIGHT, 6)
    edges = np.arange(len(moves.steps))
    axes.pcolormesh(edges, edges, np.zeros_like(moves.cosines), linewidth=0).set(
        array=None, facecolors=_shades(moves.cosines).reshape(-1, 4), edgecolors="none"
    )
    axes.invert_yaxis()
    ticks = list(range(0, len(edges), max(1, round(len(moves.cosines) / 4))))
    labels = [short_step(moves.steps[tick], moves.steps[-1]) for tick in ticks]
    axes.set_xticks(ticks, labels)
    low = len(moves.cosines)  # a label there would stand on the other axis's first one
    axes.set_yticks(ticks, ["" if tick == low else label for tick, label in zip(ticks, labels, strict=True)])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("step", labelpad=2)
    scale = sheet.axes(LEFT + 70, 20, RIGHT + 70, height - 30)
    values = np.linspace(-1, 1, 42)
    middles = ((values[1:] + values[:-1]) / 2)[None, :]
    scale.pcolormesh(values, [0, 1], np.zeros_like(middles), linewidth=0).set(
        array=None, facecolors=_shade(middles).reshape(-1, 4), edgecolors="none"
    )
    scale.set_yticks([])
    scale.set_xticks([-1, 0, 1], ["−1 opposite", "0", "1 alike"])  # noqa: RUF001 - a minus
    scale.tick_params(length=0)
    scale.spines[:].set_visible(False)


def _shades(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """The colours of the cells (M, M, 4); the diagonal, which is 1 in every run, is grey."""
    shades = _shade(cosines)
    shades[np.eye(len(cosines), dtype=bool)] = to_rgba(LIGHT["rule"])
    return shades


def _shade(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines as colours (..., 4): warm or blue, the more opaque the larger; so they suit a light page and a dark one."""
    colours = np.empty((*values.shape, 4))
    colours[...] = np.where(values[..., None] > 0, to_rgba(LIGHT["warm"]), to_rgba(LIGHT["blue"]))
    colours[..., 3] = np.abs(np.nan_to_num(values)).clip(0, 1) ** GAMMA
    return colours


# --- S and p ---------------------------------------------------------------------------------------------------------


def _draw_directions(sheet: Sheet, story: Story) -> None:
    found, height = story.directions, sheet.height
    steps = [one.step for one in found]
    upper, lower = sheet.axes(LEFT, 158, RIGHT, 26), sheet.axes(LEFT, 38, RIGHT, height - 138)
    values = [one.steady.coherence for one in found], [one.steady.recent for one in found]
    bottom = min(-0.1, *(value - 0.1 for row in values for value in row if math.isfinite(value)), 0.0)
    upper.set_ylim(max(bottom, -1), 1)
    _zone(upper, steps, [max(bottom, -1)] * len(steps), [one.needed.whole for one in found])
    for row, (colour, dash, marker), label in zip(values, LINES, ("S", "recent S"), strict=False):
        if any(map(math.isfinite, row)):
            upper.plot(
                steps, row, color=LIGHT[colour], linestyle=dash, marker=_marker(marker, len(steps)), label=label, clip_on=False
            )
    _legend(upper, 2)
    ps = [one.steady.significance.p for one in found]
    lower.set_yscale("log")
    lower.set_ylim(MIN_P, 1)
    limits = [ABOVE * one.steady.significance.limit for one in found]
    _zone(lower, steps, limits, [1.0] * len(steps), by_steps=True)
    lower.plot(steps, ps, color=LIGHT["ink"], marker=_marker("o", len(steps)), clip_on=False)
    lower.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"], minor=False)
    lower.minorticks_off()
    upper.set_ylabel("S", rotation=0, labelpad=10)
    lower.set_ylabel("p", rotation=0, labelpad=-2)
    for axes in (upper, lower):
        axes.set_xlim(*_padded(steps))
        _step_axis(axes, steps[-1])
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("asked at step", labelpad=2)
    upper.text(0.99, 0.03, "no leap", transform=upper.transAxes, ha="right", fontsize=SMALL, color=LIGHT["muted"])
    lower.text(0.99, 0.88, "no leap", transform=lower.transAxes, ha="right", fontsize=SMALL, color=LIGHT["muted"])


def _zone(axes: Axes, steps: Sequence[int], low: Sequence[float], high: Sequence[float], *, by_steps: bool = False) -> None:
    """The zone in which there is no leap: between limits that may change from one snapshot to the next."""
    ends = [_padded(steps)[0], *steps[1:-1], _padded(steps)[1]] if len(steps) > 1 else list(_padded(steps))
    if len(steps) == 1:
        low, high = [*low, *low], [*high, *high]
    axes.fill_between(ends, low, high, color=LIGHT["zone"], linewidth=0, zorder=0, step="mid" if by_steps else None)


def _padded(steps: Sequence[int]) -> tuple[float, float]:
    margin = 0.03 * (steps[-1] - steps[0]) or 1.0
    return steps[0] - margin, steps[-1] + margin


def _legend(axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncol=columns)


def _marker(marker: str, count: int) -> str:
    """None on a line of many points."""
    return marker if count <= MAX_MARKED else ""


def _step_axis(axes: Axes, last: int) -> None:
    """Steps as few and as short as they fit."""
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short_step(step, last)))


def short_step(step: float, last: float) -> str:
    """A step of an axis, in thousands or millions if the last one is so large.

    >>> short_step(1200, 1200), short_step(150_000, 600_000), short_step(1_500_000, 3_000_000)
    ('1200', '150k', '1.5M')
    """
    unit, name = (1e6, "M") if last >= 1e6 else (1e3, "k") if last >= 1e5 else (1.0, "")  # noqa: PLR2004 - two units
    return f"{step / unit:.6g}{name}"


# --- the back-test ---------------------------------------------------------------------------------------------------


def _draw_backtest(sheet: Sheet, story: Story) -> None:
    report = story.backtest
    methods = shown_methods(report)[: len(LINES)]
    axes = sheet.axes(LEFT, 38, RIGHT, 26 + 18 * (len(methods) > 2))  # noqa: PLR2004 - two in a row of the legend
    horizons = sorted({score.horizon for score in report.scores})
    seen = [value for score in report.scores if score.method in methods for value in (score.ratio, score.ratio_as_written)]
    top = min(MAX_RATIO, max([1.3, *(1.08 * value for value in seen if math.isfinite(value))]))
    axes.axhspan(1, top, color=LIGHT["zone"], linewidth=0, zorder=0)
    for method, (colour, dash, marker) in zip(methods, LINES, strict=False):
        scores = {score.horizon: score for score in report.scores if score.method == method}
        written = [scores[horizon].ratio_as_written for horizon in horizons]
        axes.plot(horizons, written, color=LIGHT[colour], linestyle=":", linewidth=1.2)
        row = [scores[horizon].ratio for horizon in horizons]
        axes.plot(horizons, row, color=LIGHT[colour], linestyle=dash, marker=marker, label=method)
    axes.set_ylim(0, top)
    axes.set_xlim(0, horizons[-1] * 1.04)
    axes.set_xticks(horizons, [short_step(horizon, horizons[-1]) for horizon in horizons])
    axes.set_xlabel("steps ahead", labelpad=2)
    axes.set_ylabel("error / error of no forecast", labelpad=4)
    axes.text(0.99, 1 - 8 / 250, "worse than no forecast", transform=axes.transAxes, ha="right", va="top", **_remark())
    _legend(axes, 2)


def _remark() -> dict[str, Any]:
    return {"fontsize": SMALL, "color": LIGHT["muted"]}


# --- tensors ---------------------------------------------------------------------------------------------------------


def _draw_tensors(sheet: Sheet, story: Story) -> None:
    most, least = shown_tensors(story)
    left, height = 14.0, sheet.height
    axes = sheet.axes(left, 36, RIGHT + 34, 4)
    span = height - 40
    shown = [*most, *least]
    top = max(1.25, *(1.04 * one.ratio for one in shown))
    top = min(top, MAX_RATIO)
    axes.set_xlim(0, top)
    axes.set_ylim(span, 0)
    axes.axvspan(1, top, color=LIGHT["zone"], linewidth=0, zorder=0)
    for one, place in zip(shown, _places(most, least), strict=True):
        colour = LIGHT["warm" if one.ratio > 1 else "blue"]
        axes.barh(place + 22, min(one.ratio, top), height=9, color=colour)
        axes.text(0, place + 13, visible(_short(one.name)), fontsize=SMALL, va="baseline")
        axes.text(1.02, 1 - (place + 22) / span, _number(one.ratio), transform=axes.transAxes, va="center", fontsize=SMALL)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1 no better"])
    axes.tick_params(length=0)


def _places(most: Sequence[TensorError], least: Sequence[TensorError]) -> Iterator[float]:
    """Where each bar begins, from the top; the least exact ones stand apart."""
    yield from (ROW * i for i in range(len(most)))
    yield from (ROW * (len(most) + i) + 14 for i in range(len(least)))


def _short(name: str) -> str:
    """The end of a name, if it is long: its beginning is that of many others."""
    return name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if math.isfinite(ratio) else NO_VALUE


# --- losses ----------------------------------------------------------------------------------------------------------


def _draw_course(sheet: Sheet, story: Story) -> None:
    course = story.course
    kinds = [kind for kind in LOSS_KINDS if course.points(kind)]
    axes = sheet.axes(LEFT, 38, RIGHT, 26 + 18 * (len(kinds) > 1 and bool(course.leaps)))  # two in a row of the legend
    for number, (start, horizon) in enumerate(course.leaps):
        label = "" if number else "length of a leap"
        axes.axvspan(start, start + horizon, color=LIGHT["zone"], linewidth=0, zorder=0, label=label)
        axes.axvline(start, color=LIGHT["ink"], linewidth=1, linestyle="--")
    for kind in kinds:
        colour, dash, marker = LINES[LOSS_KINDS.index(kind)]
        steps, losses = zip(*course.points(kind), strict=True)
        axes.plot(
            steps,
            losses,
            color=LIGHT[colour],
            linestyle=dash,
            marker=_marker(marker, len(steps)),
            markersize=3.5,
            label=f"{kind} loss",
        )
    _legend(axes, 2)
    axes.set_xlabel("step", labelpad=2)
    _step_axis(axes, max(course.points(kind)[-1][0] for kind in kinds))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


DRAW: dict[str, Callable[[Any, Story], None]] = {
    "moves": _draw_moves,
    "directions": _draw_directions,
    "backtest": _draw_backtest,
    "tensors": _draw_tensors,
    "course": _draw_course,
}
