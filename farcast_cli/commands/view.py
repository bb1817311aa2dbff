"""How a watch is shown: a live view on a terminal, plain lines elsewhere, or JSON. What it prints with is render's."""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from farcast_cli import answers
from farcast_cli.commands import render
from farcast_cli.forecast.words import shown_number
from farcast_cli.watching import CommandEnded, LeapWritten, NewVerdict, Trouble, Waiting, WatchEnded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from farcast_cli.choices import StepUnit
    from farcast_cli.watching import Event

WORK_S = 60.0  # between two lines on long work
WAITING_S = 600.0  # between two lines on waiting
MAX_ROWS = 8  # of the live table


class View(Protocol):
    """Shows what happens, and how far the work is."""

    def show(self, event: Event) -> None:
        """An event of the watch."""

    def progress(self, phase: str, total: int) -> Callable[[int], None]:
        """As every `Progress`."""


@contextmanager
def viewing(run: Path, *, as_json: bool, has_paths: bool, quiet: bool) -> Iterator[View]:
    """The view of a watch; an interrupt ends with a line on what was seen.

    Args:
        has_paths: stdout is for the paths of leaps.
    """
    seen = _Seen()
    lines = _Lines(run, seen, as_json=as_json, has_paths=has_paths, quiet=quiet)
    try:
        if as_json or quiet or not render.has_terminal():
            yield lines
        else:
            with _Screen(seen) as screen:
                yield screen
    except KeyboardInterrupt:
        render.note(seen.summary("interrupted"), quiet=quiet)
        raise


@dataclass(slots=True)
class _Seen:
    """What a last line tells."""

    step: int | None = None
    unit: StepUnit = "step"
    num_verdicts: int = 0
    num_leaps: int = 0

    def add(self, event: Event) -> None:
        if isinstance(event, NewVerdict):
            self.step, self.unit, self.num_verdicts = event.step, event.rule.unit, self.num_verdicts + 1
        elif isinstance(event, LeapWritten) and not event.existed:
            self.num_leaps += 1

    def summary(self, why: str) -> str:
        if self.step is None:
            return f"{_now()} watch ended: {why}; no snapshot was seen"
        counts = [_counted(self.num_verdicts, "verdict"), *([_counted(self.num_leaps, "leap")] if self.num_leaps else [])]
        return f"{_now()} watch ended: {why}; newest {self.unit} {self.step}, {', '.join(counts)}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _now() -> str:
    return f"{datetime.now().astimezone():%H:%M:%S}"


def age(seconds: float) -> str:
    """A time in one unit.

    >>> age(45), age(200), age(7300), age(200_000)
    ('45 s', '3 min', '2 h', '2 days')
    """
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            return f"{seconds // size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


# --- lines -----------------------------------------------------------------------------------------------------------


def line(event: Event, seen: _Seen) -> str:
    """An event for people."""
    match event:
        case NewVerdict():
            return f"{_now()} {event.rule.unit} {event.step}: {event.words}{_figures(event)}"
        case LeapWritten(_, path, valid_step, existed, unit):
            return f"{_now()} {'already there' if existed else 'wrote'} {path}, a forecast of {unit} {valid_step}"
        case CommandEnded(_, log, seconds, failed):
            return f"{_now()} the command of --on-leap {failed or 'ended well'}, after {age(seconds)}; its output is in {log}"
        case Trouble(text, hint):
            return f"{_now()} problem: {text}" + (f" (hint: {hint})" if hint else "")
        case Waiting():
            return f"{_now()} {_waiting(event)}"
        case WatchEnded(_, reason):
            return seen.summary(reason)


def _figures(event: NewVerdict) -> str:
    if math.isnan(event.coherence):
        return ""
    p = f"{event.significance:.2g}" if math.isfinite(event.significance) else "unknown"
    known = f"S {shown_number(event.coherence)}, p {p}, b {shown_number(event.ratio)}"
    return f" ({event.num_snapshots} snapshots, {known})"


def _waiting(event: Waiting, more_s: float = 0.0) -> str:
    newest = "" if event.step is None else f"; newest {event.unit} {event.step}, {age(event.age_s + more_s)} ago"
    since = f", for {age(event.age_s + more_s)}" if event.step is None else ""
    return f"waiting for {event.what}{since}{newest}"


@dataclass(slots=True)
class _Lines:
    """One line for each event; of waiting and of long work now and then."""

    run: Path
    seen: _Seen
    as_json: bool
    has_paths: bool
    quiet: bool
    waited: float = -math.inf
    worked: float = field(default_factory=time.monotonic)

    def show(self, event: Event) -> None:
        self.seen.add(event)
        if isinstance(event, Waiting):
            if time.monotonic() - self.waited < WAITING_S:
                return
            self.waited = time.monotonic()
        elif not isinstance(event, Trouble):
            self.waited = time.monotonic()
        if self.as_json:
            render.as_json(answers.of_watch(event, self.run))
        elif isinstance(event, LeapWritten) and not event.existed:
            render.paths([event.path])
        self._say(event)
        self.worked = time.monotonic()

    def _say(self, event: Event) -> None:
        """Verdicts are the result, unless paths or JSON are; all else is for stderr."""
        text = line(event, self.seen)
        if isinstance(event, NewVerdict) and not self.as_json and not self.has_paths:
            render.text(text + "\n")
        else:
            render.note(text, quiet=self.quiet and not isinstance(event, Trouble))

    def progress(self, phase: str, total: int) -> Callable[[int], None]:
        """Tells long work once a minute."""
        done = 0

        def tell(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if time.monotonic() - self.worked >= WORK_S:
                self.worked = time.monotonic()
                render.note(f"{_now()} {_work(phase, done, total)}", quiet=self.quiet)

        return tell


def _work(phase: str, done: int, total: int) -> str:
    return f"{phase}: {done / total:.0%} of {render.size(total)}" if total else phase


# --- the live view ---------------------------------------------------------------------------------------------------


class _Screen:
    """The last verdicts as a table, and what the watch does; everything else scrolls by above."""

    def __init__(self, seen: _Seen) -> None:
        self._seen = seen
        self._rows: deque[NewVerdict] = deque(maxlen=MAX_ROWS)
        self._waiting: tuple[Waiting, float] | None = None
        self._work = "looking at the run"
        self._last = ""
        self._live = Live(get_renderable=self._picture, console=render.stderr(), refresh_per_second=2)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting, self._work = None, ""
        self._live.__exit__(*error)  # type: ignore[arg-type]
        if self._last:
            render.note(self._last)

    def show(self, event: Event) -> None:
        self._seen.add(event)
        self._waiting = (event, time.monotonic()) if isinstance(event, Waiting) else None
        self._work = ""
        if isinstance(event, NewVerdict):
            self._rows.append(event)
        elif isinstance(event, WatchEnded):
            self._last = line(event, self._seen)
        elif not isinstance(event, Waiting):
            self._live.console.print(Text(line(event, self._seen)), soft_wrap=True)

    def progress(self, phase: str, total: int) -> Callable[[int], None]:
        """Shown under the table."""
        done = 0

        def tell(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self._work = _work(phase, done, total)

        self._waiting, self._work = None, phase
        return tell

    def _picture(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0))
        unit = self._rows[-1].rule.unit if self._rows else "step"
        for heading, justify in ((unit, "right"), ("snapshots", "right"), ("S", "right"), ("p", "right"), ("b", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        table.add_column("verdict")
        for row in self._rows:
            table.add_row(*_cells(row), style="bold" if row is self._rows[-1] else "")
        status = self._work
        if self._waiting:
            event, since = self._waiting
            status = _waiting(event, time.monotonic() - since)
        return Group(*([table] if self._rows else []), *([Text(status, style="dim")] if status else []))


def _cells(row: NewVerdict) -> tuple[Text, ...]:
    s, b = ("-" if math.isnan(figure) else f"{figure:.2f}" for figure in (row.coherence, row.ratio))
    p = "-" if math.isnan(row.significance) else f"{row.significance:.2g}"
    words = Text(row.words, style="green" if row.verdict == "forecast" else "")
    return (Text(str(row.step)), Text(str(row.num_snapshots)), Text(s), Text(p), Text(b), words)
