"""The learning rates of a run, from what its trainer saved: at each snapshot, between them, and for the steps to come.

The rate that a snapshot holds is that of the step after it. Between snapshots the schedule's own rates are added up where
the files tell its formula; else the rate counts as a line from snapshot to snapshot. Nothing is written.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError
from farcast_cli.formats.tree import find
from farcast_cli.run.pace import Pace
from farcast_cli.state.counters import is_steady, schedule_count_at
from farcast_cli.state.files import as_numbers, load_histories, param_groups, schedule_at, scheduler_paths
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.schedules import counter_path, find_formula, rates_ahead
from farcast_cli.trainers.torch_schedules import schedule_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.trainers.base import Role, Snapshot

    Rate = Callable[[int], float]
    Believed = tuple[int, Rate | None]

TOLERANCE = 1e-6  # relative; a rate may be kept in float32
MAX_STEPPED = 400_000  # counts of a schedule, some two seconds
MAX_ADDED = 512  # rates of a piece that are added up; of a longer one, as many evenly spread
PIECES_AHEAD = 100


_UNREAD: tuple[frozenset[Role], ...] = (frozenset({"scheduler"}), frozenset({"scheduler", "optimizer"}))
"""The parts that are read for a rate: the optimiser's own only where nothing else tells one."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a snapshot says: its step, all rates, and its schedules and groups as numbers."""

    step: int
    rates: tuple[float, ...]
    schedules: dict[TreePath, dict[str, Any]]
    groups: tuple[list[dict[str, Any]], ...]


def read_pace(snapshots: Sequence[Snapshot], *, ahead: int = 0) -> Pace:
    """The sum of a run's rates from its first snapshot to `ahead` steps after its last, as far as that can be known.

    Args:
        snapshots: two or more of one run, in order. Their schedules count on from one to the next.
        ahead: steps after the last one. Where they cannot be known the answer ends at the last snapshot.

    Returns:
        a clock of rates; or one that counts steps, and says why, where a rate is not known at every snapshot or the
        parameter groups follow different schedules.

    Cost: the state files but the optimiser's own, which is read only where nothing else tells a rate; no tensors.
    """
    try:
        return _read(snapshots, ahead)
    except (FarcastError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        return Pace(why=f"the trainer's state cannot be read for its learning rates ({type(error).__name__})")


def rate_at(snapshot: Snapshot) -> float | None:
    """The highest learning rate that a snapshot holds; None where it holds none."""
    for unread in _UNREAD:
        try:
            rates = _look(snapshot, unread).rates
        except (FarcastError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None
        if rates:
            return max(rates)
    return None


def _read(snapshots: Sequence[Snapshot], ahead: int) -> Pace:
    seen = [_look(snapshot, _UNREAD[0]) for snapshot in snapshots]
    if not all(one.rates for one in seen):
        seen = [_look(snapshot, _UNREAD[1]) for snapshot in snapshots]
    if not all(one.rates for one in seen):
        return _of_log(snapshots, ahead)
    column = _shared([one.rates for one in seen])
    if column is None:
        return Pace(why="the parameter groups follow different learning-rate schedules")
    known = [(one.step, one.rates[column]) for one in seen]
    if not any(rate for _, rate in known):
        return Pace(why="the learning rate is 0 at every snapshot")
    return _pace(known, _formula(seen, known, snapshots[-1], ahead), ahead)


# --- at the snapshots ------------------------------------------------------------------------------------------------


def _look(snapshot: Snapshot, unread: frozenset[Role]) -> _Seen:
    """The rates of a snapshot, of the files that are read already and of those with the roles named."""
    parts = tuple(part for part in snapshot.parts if part.content is not None or part.role in unread)
    kept = snapshot.source and replace(
        snapshot.source, states=tuple(state for state in snapshot.source.states if state.is_read or state.role in unread)
    )
    schedules: dict[TreePath, dict[str, Any]] = {}
    groups: list[list[dict[str, Any]]] = []
    for name, history in load_histories([replace(snapshot, parts=parts, source=kept)]).items():
        _, tree, file = history.states[0]
        schedules |= {(name, *path): schedule_at(tree, path, file) for path in scheduler_paths(tree)}
        groups += [
            [as_numbers({k: v for k, v in group.items() if k != "params"}, file) for group in one] for one in param_groups(tree)
        ]
    told = [group["lr"] for one in groups for group in one]
    told = told or [rate for state in schedules.values() for rate in state.get("_last_lr") or ()]
    is_whole = all(isinstance(rate, (int, float)) and 0 <= rate < math.inf for rate in told)
    return _Seen(snapshot.step, tuple(map(float, told)) if is_whole else (), schedules, tuple(groups))


def _shared(rates: Sequence[tuple[float, ...]]) -> int | None:
    """The group whose rate stands for all: the others' are constant multiples of it, or always 0. None where they are not."""
    if len({len(row) for row in rates}) != 1:
        return None
    column = max(range(len(rates[0])), key=lambda index: sum(row[index] for row in rates))
    highest = max(rates, key=lambda row: row[column])
    others = zip(*rates, strict=True)
    shared = all(
        math.isclose(rate * highest[column], highest[index] * row[column], rel_tol=TOLERANCE, abs_tol=1e-30)
        for index, other in enumerate(others)
        for rate, row in zip(other, rates, strict=True)
    )
    return column if shared else None


# --- the schedule ----------------------------------------------------------------------------------------------------


def _formula(seen: Sequence[_Seen], known: Sequence[tuple[int, float]], last: Snapshot, ahead: int) -> Believed:
    """The rate of the step after any step, and from which step on it can be believed."""
    if not seen[-1].schedules:
        return _without_schedule(seen, known, last)
    key = next(iter(seen[-1].schedules))
    scheduled = [one for one in seen if key in one.schedules]
    name = schedule_name(scheduled[-1].schedules[key])
    if name == "ReduceLROnPlateau":
        return known[-1][0], partial(_always, known[-1][1])
    count_at = partial(_count_at, [(one.step, find(one.schedules[key], counter_path(one.schedules[key]))) for one in scheduled])
    if name == "LambdaLR":
        rate = _lambda_rate([one.schedules[key] for one in scheduled], last)
        return _believed(lambda step: rate(count_at(step)), known) if rate else (known[-1][0], None)
    for one in (scheduled[0], scheduled[-1]):
        first, end = count_at(one.step), count_at(known[-1][0] + ahead)
        table = _table(one, key, end - first)
        found = _believed(partial(_looked_up, table, count_at, first), [point for point in known if point[0] >= one.step])
        if found[1] and found[0] <= one.step:
            return found
    return known[-1][0], None


def _without_schedule(seen: Sequence[_Seen], known: Sequence[tuple[int, float]], last: Snapshot) -> Believed:
    """Of a loop that saves none: constant, or what explains the groups' rates from those that they began with."""
    if len({rate for _, rate in known}) == 1:
        return known[0][0], partial(_always, known[0][1])
    first = max((group.get("initial_lr") or 0.0 for one in seen[-1].groups for group in one), default=0.0)
    trainer = trainer_of(last)
    if trainer.computes_rates and (named := trainer.formula(last)):
        return _believed(named, known)
    formula = find_formula(known, first, trainer.num_steps(last))
    return _believed(lambda step: first * formula(step), known) if formula else (known[-1][0], None)


def _believed(rate: Rate, known: Sequence[tuple[int, float]]) -> Believed:
    """A formula set to the last rate seen, and the snapshot from which on it agrees with all; None where not with the last.

    The formula may be of another group, whose rate is a constant multiple.
    """
    peak = max(known, key=lambda point: point[1])
    found = rate(peak[0])
    factor = peak[1] / found if found else math.nan
    agrees = [math.isclose(factor * rate(step), value, rel_tol=TOLERANCE, abs_tol=TOLERANCE * peak[1]) for step, value in known]
    if not agrees[-1]:
        return known[-1][0], None
    first = next(index for index in range(len(known)) if all(agrees[index:]))
    return known[first][0], lambda step: factor * rate(step)


def _always(rate: float, _: int) -> float:
    return rate


def _count_at(counts: Sequence[tuple[int, int]], step: int) -> int:
    """How often the schedule had been stepped by a step: between snapshots on a line, behind them as training goes on."""
    (first, low), (last, high) = counts[0], counts[-1]
    if len(counts) > 1 and (step <= last or is_steady(counts)):
        (s0, c0), (s1, c1) = next(((a, b) for a, b in itertools.pairwise(counts) if step <= b[0]), ((first, low), (last, high)))
        return math.floor(c0 + Fraction(c1 - c0, s1 - s0) * (step - s0))
    found = schedule_count_at(counts, step)
    if found is None:
        raise ValueError("a schedule whose count does not rise steadily")
    return found


def _table(one: _Seen, key: TreePath, count: int) -> list[float]:
    """The rates at a schedule's present count and those after it; of its groups, the one with the largest."""
    state = one.schedules[key]
    fitting = [groups for groups in one.groups if [group.get("lr") for group in groups] == state.get("_last_lr")]
    owner = fitting[0] if fitting else one.groups[0] if len(one.groups) == 1 else []
    rows = rates_ahead(state, [dict(group) for group in owner], min(count, MAX_STEPPED))
    return list(max(zip(*rows, strict=True), key=sum)) if rows else []


def _looked_up(table: Sequence[float], count_at: Rate, first: int, step: int) -> float:
    index = int(count_at(step)) - first
    return table[index] if 0 <= index < len(table) else math.nan


def _lambda_rate(states: Sequence[dict[str, Any]], last: Snapshot) -> Rate | None:
    """The formula of a schedule that keeps none in its file, by its count: as the run's arguments name it, or as inferred."""
    base, rates = states[-1].get("base_lrs") or [], states[-1].get("_last_lr") or []
    if len(base) != len(rates) or not any(base):
        return None
    column = max(range(len(base)), key=lambda index: base[index])
    points = [(int(state["last_epoch"]), float(state["_last_lr"][column])) for state in states]
    trainer = trainer_of(last)
    formula = find_formula(points, base[column], trainer.num_steps(last), named=trainer.formula(last))
    return (lambda count: base[column] * formula(count)) if formula else None


# --- the log ---------------------------------------------------------------------------------------------------------


def _of_log(snapshots: Sequence[Snapshot], ahead: int) -> Pace:
    """Of a Trainer's checkpoints without optimiser and schedule: by the log, and the formula that the arguments name."""
    trainer = trainer_of(snapshots[-1])
    points = trainer.logged_rates(snapshots[-1])
    steps = [snapshot.step for snapshot in snapshots]
    if not points:
        return Pace(why="no snapshot contains its learning rate")
    named = trainer.formula(snapshots[-1])
    for lag in trainer.log_lags:
        since, rate = _believed(named, [(step - lag, rate) for step, rate in points]) if named else (0, None)
        if rate and since <= points[0][0]:
            return _pace([(step, rate(step)) for step in steps], (steps[0], rate), ahead)
    gap = max((b - a for (a, _), (b, _) in itertools.pairwise(points)), default=0)
    if not points[0][0] - gap <= steps[0] or not steps[-1] <= points[-1][0] + gap:
        return Pace(why="the log lacks the learning rate at some snapshots")
    rates = dict(points)
    is_constant = len(set(rates.values())) == 1
    edges = sorted({*steps, *(step for step in rates if steps[0] < step < steps[-1])})
    known = [(step, _on_the_line(points, step)) for step in edges]
    formula = partial(_always, points[-1][1]) if is_constant else None
    return _pace(known, (steps[0] if is_constant else steps[-1], formula), ahead)


def _on_the_line(points: Sequence[tuple[int, float]], step: int) -> float:
    """The rate at a step on the lines through the points; before the first and after the last it is theirs."""
    for (s0, r0), (s1, r1) in itertools.pairwise(points):
        if s0 <= step <= s1:
            return r0 + (r1 - r0) * (step - s0) / (s1 - s0)
    return points[0][1] if step < points[0][0] else points[-1][1]


# --- the clock -------------------------------------------------------------------------------------------------------


def _pace(known: Sequence[tuple[int, float]], formula: Believed, ahead: int) -> Pace:
    since, rate = formula
    return Pace.of([*_past(known, since, rate), *(_future(known[-1][0], ahead, rate) if rate else ())])


def _past(known: Sequence[tuple[int, float]], since: int, rate: Rate | None) -> Iterator[tuple[int, int, float]]:
    for (first, before), (last, after) in itertools.pairwise(known):
        exact = _mean(rate, first, last) if rate and first >= since else math.nan
        yield first, last, exact if math.isfinite(exact) else (before + after) / 2


def _future(last: int, ahead: int, rate: Rate) -> Iterator[tuple[int, int, float]]:
    """Up to where the rates are known."""
    count = min(PIECES_AHEAD, ahead)
    edges = [last + ahead * index // count for index in range(count + 1)] if count else []
    for first, after in itertools.pairwise(edges):
        mean = _mean(rate, first, after)
        if not math.isfinite(mean):
            return
        yield first, after, mean


def _mean(rate: Rate, first: int, last: int) -> float:
    """The mean rate of the steps after `first` up to `last`, exactly itself where it is constant."""
    count = min(MAX_ADDED, last - first)
    rates = [rate(first + ((2 * index + 1) * (last - first) - count) // (2 * count)) for index in range(count)]
    return rates[0] if len(set(rates)) == 1 else math.fsum(rates) / count
