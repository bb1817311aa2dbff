"""The words of a report: the headline, and for each panel a title, what it shows in a sentence, and a table of its numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from farcast_cli import __version__
from farcast_cli.errors import listed, visible
from farcast_cli.forecast.words import chance, clock_line, counted, recent_half, shown_number
from farcast_cli.headline import advised
from farcast_cli.run.losses import LOSS_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farcast_cli.forecast.backtest import Score
    from farcast_cli.forecast.judgement import BacktestReport, TensorError
    from farcast_cli.reports.story import Proposal, Story
    from farcast_cli.run.losses import LossKind, Points

MAX_METHODS = 3  # of a back-test, besides the one that predict uses
MAX_EACH = 10  # of the most exact tensors, and of the least exact ones
CASES = ("all warm: leap far", "a warm band along the diagonal: leap a short way", "pale: do not leap")
"""How to read the cosines."""
_DECIDES = "S and p decide"
"""The remark on a number above 1 where a leap is advised all the same."""
NO_VALUE = "–"  # noqa: RUF001 - a dash is what a table shows for no number


@dataclass(frozen=True, slots=True)
class Headline:
    """The verdict for people: in three words, why, and how sure."""

    title: str
    why: str
    sure: str
    next_step: str
    figures: tuple[tuple[str, str, str], ...]
    """The numbers that decided: name, value, remark."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table of numbers: its headings and rows, all as text."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """A part of a report. `name` says which figure belongs to it; a panel without rows has none."""

    name: str
    title: str
    message: str
    reading: str
    """How to read the numbers."""
    picture: str
    """What else to know of the picture."""
    table: Numbers


def panels(story: Story) -> tuple[Panel, ...]:
    """The panels in the order in which they decide."""
    return (_moves(story), _directions(story), _backtest(story), _tensors(story), _course(story))


# --- the headline ----------------------------------------------------------------------------------------------------


def headline(story: Story) -> Headline:
    """The verdict on what `predict` would do."""
    found = story.proposal
    said = advised(found.outcome, found.purpose)
    return Headline(said.title, said.why, said.sure, found.next_step, tuple(_deciding(found)))


def _deciding(found: Proposal) -> Iterator[tuple[str, str, str]]:
    decision = found.outcome.decision
    if found.purpose == "resume":
        yield from _of_direction(found)
    overruled = found.purpose == "resume" and decision.verdict == "forecast"
    if math.isfinite(decision.ratio) and not decision.is_average:
        yield "back-test b", shown_number(decision.ratio), _DECIDES if overruled and decision.ratio > 1 else "1: no better"
    if math.isfinite(decision.expected):
        yield (
            "expected error",
            shown_number(decision.expected),
            _DECIDES if overruled and decision.is_farther else "1: no forecast",
        )


def _of_direction(found: Proposal) -> Iterator[tuple[str, str, str]]:
    decision = found.outcome.decision
    yield "direction S", shown_number(decision.coherence), f"needed {found.needed.whole:.2g}"
    if math.isfinite(decision.recent):
        yield "recent S", shown_number(decision.recent), f"needed {found.needed.recent:.2g}"
    if math.isfinite(decision.significance.p):
        yield "chance p", f"{decision.significance.p:.2g}", f"at most {decision.significance.limit:.2g}"


# --- the panels ------------------------------------------------------------------------------------------------------


def _moves(story: Story) -> Panel:
    moves = story.moves
    few = f" Each move spans {moves.every} distances between snapshots." if moves.every > 1 else ""
    message = (
        f"Mean cosine of a move and the next one: {shown_number(moves.next_mean)};"
        f" of moves at least half the history apart: {shown_number(moves.far_mean)}."
        f"{few}"
    )
    spans = list(zip(moves.steps, moves.steps[1:], strict=False))
    cosines = [float("nan"), *(float(moves.cosines[i, i + 1]) for i in range(len(spans) - 1))]
    rows = tuple(
        (f"{a} to {b}", number(cosine), number(float(moves.cosines[0, i]) if i else 1.0))
        for i, ((a, b), cosine) in enumerate(zip(spans, cosines, strict=True))
    )
    return Panel(
        "moves",
        "Cosines between the run's moves",
        message,
        "A move is the change of all weights from one snapshot to the next. 1: two moves point the same way; 0: they have nothing"
        " in common; below 0: one undoes the other.",
        "Rows and columns are the moves in their order.",
        Numbers(("move", "cosine with the one before", "with the first"), rows),
    )


def _directions(story: Story) -> Panel:
    found = story.directions
    count = sum(one.is_steady for one in found)
    now = "the last one included" if found[-1].is_steady else "but not at the last one"
    message = (
        f"S and p allowed a short leap at {count} of {len(found)} snapshots{f', {now}' if 0 < count < len(found) else ''}."
        f" Now: S = {shown_number(found[-1].steady.coherence)}, {chance(found[-1].steady.significance)};"
        f" {recent_half(found[-1].steady.recent)}."
    )
    rows = tuple(
        (
            str(one.step),
            number(one.steady.coherence),
            number(one.steady.recent),
            number(one.steady.significance.p, digits=3),
            "yes" if one.is_steady else "no",
        )
        for one in found
    )
    return Panel(
        "directions",
        "S and p, had you asked earlier",
        message,
        "At each step, only the snapshots up to it count. A leap needs a high S and a low p.",
        "In the shaded zone farcast does not leap. With few snapshots p cannot be as small as 0.01, so its limit is higher there.",
        Numbers((story.fitted.rule.unit, "S", "recent S", "p", "leap"), rows),
    )


def _backtest(story: Story) -> Panel:
    report, (horizon, method) = story.backtest, story.tested
    tested = {(score.horizon, score.method): score for score in report.scores}
    chosen = tested.get((horizon, method))
    message = "The weights did not move." if chosen else "The history is too short to test a method."
    if chosen and math.isfinite(chosen.ratio):
        message = (
            f"{method}, which predict uses, had {number(chosen.ratio)} of the error of no forecast, {counted(horizon, story.fitted.rule.unit)} ahead;"
            f" as written, {number(chosen.ratio_as_written)}."
        )
    rows = tuple(
        (str(score.horizon), score.method, number(score.ratio), number(score.ratio_as_written))
        for score in sorted(shown_scores(report), key=lambda one: (one.horizon, one.ratio))
    )
    return Panel(
        "backtest",
        "Back-test: error by steps ahead",
        message,
        "To resume, predict uses blend even if another method has a smaller b: runs that resumed from it gained more."
        " 0 is perfect, 1 is no better than no forecast. b is of an update no longer than the run's past move; as written is of the"
        " update that predict writes.",
        "Dotted: as written.",
        Numbers(("horizon", "method", "b", "as written"), rows),
    )


def shown_methods(report: BacktestReport) -> tuple[str, ...]:
    """The methods with the smallest mean b, and those that the verdicts are on."""
    methods = dict.fromkeys(score.method for score in report.scores)
    means = {name: [s.ratio for s in report.scores if s.method == name] for name in methods if name != "persistence"}
    best = sorted(means, key=lambda name: sum(means[name]) / len(means[name]))[:MAX_METHODS]
    chosen = [name for name, _ in report.decisions.values() if name in means]
    return tuple(dict.fromkeys([*chosen, *best]))


def shown_scores(report: BacktestReport) -> list[Score]:
    """The scores of these methods."""
    shown = shown_methods(report)
    return [score for score in report.scores if score.method in shown]


def _tensors(story: Story) -> Panel:
    horizon, method = story.tested
    moved = [one for one in story.tensors if math.isfinite(one.ratio)]
    worse = sum(one.ratio > 1 for one in moved)
    shown = [one for group in shown_tensors(story) for one in group]
    message = "No tensor moved." if story.tensors else "The history is too short to test the tensors."
    if moved:
        message = (
            f"{worse} of {len(moved)} tensors {'is' if worse == 1 else 'are'} worse than no forecast: b is {number(moved[0].ratio)} to"
            f" {number(moved[-1].ratio)}."
        )
    rows = tuple((one.name, f"{one.num_elements:,}", number(one.ratio)) for one in shown)
    some = f" The {MAX_EACH} most exact and the {MAX_EACH} least exact of {len(moved)}." if len(shown) < len(moved) else ""
    still = f" {len(story.tensors) - len(moved)} more did not move." if len(moved) < len(story.tensors) else ""
    return Panel(
        "tensors",
        "Tensors by error",
        message,
        f"Back-test ratio b of each tensor by {method}, {counted(horizon, story.fitted.rule.unit)} ahead: 0 is perfect, 1 is no better than no forecast.{some}{still}",
        "",
        Numbers(("tensor", "values", "b"), rows),
    )


def shown_tensors(story: Story) -> tuple[list[TensorError], list[TensorError]]:
    """The most exact tensors and the least exact ones; all are in the first group if they are few."""
    moved = [one for one in story.tensors if math.isfinite(one.ratio)]
    return (moved, []) if len(moved) <= 2 * MAX_EACH else (moved[:MAX_EACH], moved[-MAX_EACH:])


def _course(story: Story) -> Panel:
    course = story.course
    found = [(kind, course.points(kind)) for kind in LOSS_KINDS if course.points(kind)]
    message = " ".join(_losses(kind, points) for kind, points in found) or f"No losses are known: {course.why_none}."
    if found:
        message += f" {_leaps(story)}"
    rows = tuple(
        (kind, str(step), f"{loss:.4g}", _leap_at(course.leaps, step)) for kind, points in found for step, loss in points
    )
    return Panel(
        "course",
        "Loss and leaps",
        message,
        f"The losses that the run logged.{course.note}",
        "At a dashed line, training resumed from a forecast; the shaded time after it is as long as the leap.",
        Numbers(("loss", "step", "value", "leap"), rows),
    )


def _losses(kind: LossKind, points: Points) -> str:
    (first, before), (last, after) = points[0], points[-1]
    return f"The {kind} loss goes from {before:.3g} at step {first} to {after:.3g} at step {last}."


def _leaps(story: Story) -> str:
    leaps, worth = story.course.leaps, story.course.worth
    if not leaps:
        return "No leap is known."
    many = f"The run made {len(leaps)} leap{'s' * (len(leaps) > 1)}, at step {listed(step for step, _ in leaps)}."
    return f"{many} {worth.told()}." if worth else many


def _leap_at(leaps: tuple[tuple[int, int], ...], step: int) -> str:
    return next((f"{horizon} steps" for start, horizon in leaps if start == step), "")


# --- the facts -------------------------------------------------------------------------------------------------------


def facts(story: Story) -> tuple[tuple[str, str], ...]:
    """The run in facts.

    Args:
        run: its folder, as the user named it.
    """
    return tuple((name, visible(value)) for name, value in _facts(story) if value)


def _facts(story: Story) -> Iterator[tuple[str, str]]:
    record, steps = story.fitted.provenance, story.fitted.steps
    num_values = sum(math.prod(tensor.shape) for tensor in record.tensors)
    yield "run", record.directory
    yield "layout", record.layout
    rule = story.fitted.rule
    yield "snapshots", f"{len(steps)}, {rule.unit}s {steps[0]} to {steps[-1]}"
    yield "unit", f"the {rule.unit}: every number of steps counts {rule.unit}s" if rule.unit != "step" else ""
    yield "steps from", f"--step-from {rule.source}" if rule.source else ""
    yield "parameters", f"{num_values:,} in {len(record.tensors)} tensors"
    yield "element types", _counted(tensor.dtype for tensor in record.tensors)
    yield "copied", _counted(one.kind for one in story.fitted.copied) or "none"
    yield "remarks", _counted(tensor.remark for tensor in record.tensors if tensor.remark)
    yield "notes", "; ".join(record.notes)
    yield "sample", "all values" if record.num_samples is None else f"up to {record.num_samples:,} values of each tensor"
    yield "clock", clock_line(story.backtest.pace, unit=story.backtest.rule.unit).removeprefix("clock: ")
    yield "purpose", story.proposal.purpose
    yield "proposal", "; ".join(story.proposal.outcome.chosen)
    yield "leap before", f"the history begins after the leap to step {record.leap.resumes_after}" if record.leap else ""
    yield "include", " ".join(record.include)
    yield "exclude", " ".join(record.exclude)
    yield "pattern", record.pattern
    yield "not known", f"the end of the run: {story.proposal.note}" if story.proposal.note else ""
    yield (
        "farcast",
        __version__ if record.farcast_version == __version__ else f"{__version__}; fitted by {record.farcast_version}",
    )


def _counted(kinds: Iterator[str]) -> str:
    """Kinds, the commonest first, with how many there are of each."""
    return ", ".join(f"{kind} ({count})" for kind, count in Counter(kinds).most_common())


def short_name(story: Story) -> str:
    """The name of the run's folder, which people know a run by."""
    place = story.fitted.provenance.directory
    return PurePath(place).name or place


def number(value: float, *, digits: int = 2) -> str:
    """A number of a table; a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else NO_VALUE
