"""What a leap is computed from: the memory and the newest snapshot, or at first the snapshots that are there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.forecast.accumulate import accumulate
from farcast_cli.forecast.history import past_of
from farcast_cli.forecast.memory import basis_of, check_memory_of, read_memory, remembered
from farcast_cli.forecast.timeline import evenly
from farcast_cli.run.alignment import align, since_last_change
from farcast_cli.run.kept import as_option
from farcast_cli.run.pace import Pace
from farcast_cli.run.trust import StepRule
from farcast_cli.state.rates import rate_at, read_pace
from farcast_cli.state.trained import trained_in
from farcast_cli.tensors import is_batch_norm_statistic

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.forecast.memory import Memory, MemoryBasis
    from farcast_cli.forecast.momentum import Remembered
    from farcast_cli.leaps.ask import Ask
    from farcast_cli.request import Request
    from farcast_cli.run.alignment import Alignment
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot

MAX_HISTORY = 10  # snapshots that a first memory is made of: each is a file to read in full
RISING = 1.01  # times the rate before


def known_memory(place: Path, trajectory: Trajectory) -> tuple[Memory | None, list[str]]:
    """The memory of this run, and a note where there is one that is of no use.

    Raises:
        OutputError: the memory of another run lies there.
    """
    memory = read_memory(place)
    if memory is None:
        return None, []
    origin = trajectory.origin
    check_memory_of(memory, trajectory.directory)
    if trajectory.pattern != memory.record.pattern:
        return None, [f"{place} belongs to the run of --pattern {memory.record.pattern!r}: a new memory starts"]
    rule = StepRule(memory.record.step_from, memory.record.unit)
    differences = (
        (trajectory.rule != rule, f"counts its steps by {' '.join(rule.options) or 'neither --step-from nor --unit'}"),
        (trajectory.weights != memory.record.weights, f"is of {as_option(memory.record.weights)}"),
    )
    if other := next((text for differs, text in differences if differs), ""):
        return None, [f"{place} {other}: a new memory starts"]
    before = next((one for one in trajectory.snapshots[:-1] if one.step == memory.record.origin_step), None)
    if before is not None and not memory.began_at(before):
        return None, [f"{before.path.name} has changed since the last call: a new memory starts"]
    if origin.step <= memory.record.landing_step and not memory.began_at(origin):
        where = f"step {memory.record.landing_step}, and the newest snapshot is of step {origin.step}"
        return None, [f"the memory ends at {where}: a new memory starts"]
    return memory, []


@dataclass(frozen=True, slots=True)
class StretchTime:
    """The clock, and the last stretch, from step `first` to `last`; the next is `every` steps long."""

    pace: Pace
    first: int
    last: int
    every: int

    @property
    def ahead(self) -> float:
        """The length of the next stretch."""
        return self.pace.total(self.last, self.last + self.every)

    @property
    def is_rising(self) -> bool:
        """Whether the learning rate over the next stretch is above that of the last: a warm-up, or a restart."""
        if not self.pace.rates or self.first == self.last:
            return False
        return self.pace.mean(self.last, self.last + self.every) > RISING * self.pace.mean(self.first, self.last)

    @property
    def rate(self) -> float | None:
        """At the origin."""
        return self.pace.mean(self.last, self.last + self.every) if self.pace.rates else None


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a leap is computed from: aligned files, and over their basis the stretches and what was known before."""

    alignment: Alignment
    snapshots: tuple[Snapshot, ...]
    products: NDArray[np.float64]
    stretches: tuple[tuple[NDArray[np.float64], float], ...]
    known: Remembered | None
    time: StretchTime
    has_moves: bool
    memory: Memory | None
    notes: tuple[str, ...] = field(default=())


def gathered(ask: Ask, trajectory: Trajectory, memory: Memory | None, notes: list[str]) -> Gathered:
    chosen: dict[str, Any] = {"include": ask.selection.include, "exclude": ask.selection.exclude}
    if memory:
        basis = basis_of(memory, trajectory.origin, **chosen)
        if isinstance(basis, str):
            notes.append(f"{memory.path} cannot be used: {basis}: a new memory starts")
        else:
            first, last = memory.record.landing_step, trajectory.origin.step
            pace, every = _pace_since(memory, basis, ask, trajectory.origin)
            products = _products(basis.alignment, trajectory.origin, ask.request)
            unit = np.eye(len(products))
            known = remembered(memory, unit[-2])
            length = pace.total(first, last)  # 0 where the user asks again for a leap that was refused, or the rate was 0
            stretches = ((unit[int(basis.has_moves)], length),) if length else ()
            time = StretchTime(pace, first, last, every)
            return Gathered(
                basis.alignment, basis.snapshots, products, stretches, known, time, basis.has_moves, memory, tuple(notes)
            )
    return _from_history(ask, trajectory, notes)


def _pace_since(memory: Memory, basis: MemoryBasis, ask: Ask, origin: Snapshot) -> tuple[Pace, int]:
    """The learning rates from the landing on, and the steps until the next leap.

    Of the landing and the origin alone: whether the trainer keeps the snapshots in between makes no difference.
    """
    record, first, last = memory.record, memory.record.landing_step, origin.step
    every = ask.every or (last - first if last > first else record.every)
    known = Pace()
    if len(basis.snapshots) > 1:
        known = read_pace([basis.snapshots[0].settle(first, "the memory"), origin], ahead=every)
    if not known.rates and (now := rate_at(origin) or record.rate):
        past = [(first, last, (now + (record.rate or now)) / 2)] if last > first else []
        known = Pace.of([*past, (last, last + every, now)])
    wanted = record.clock if record.count else ask.request.clock  # a memory keeps the clock that it began with
    return known.reaching(first, last + every).clocked(wanted, first, last + every), every


def _from_history(ask: Ask, trajectory: Trajectory, notes: list[str]) -> Gathered:
    """A first memory from the snapshots that are there, since the last leap that the run resumed from."""
    past = past_of(trajectory, ask.request.ledgers, minimum=1)
    notes += past.cautions
    history = past.history.trajectory.snapshots
    history, begins = since_last_change(history, include=ask.selection.include, exclude=ask.selection.exclude, minimum=1)
    snapshots = tuple(history[index] for index in evenly(len(history), MAX_HISTORY))
    alignment = align(snapshots, include=ask.selection.include, exclude=ask.selection.exclude)
    products = _products(alignment, snapshots[-1], ask.request)
    first, last = snapshots[-2:][0].step, snapshots[-1].step
    every = ask.every or max(1, last - first)
    bounds = snapshots[0].step, last + every
    pace = read_pace(snapshots, ahead=every).reaching(*bounds).clocked(ask.request.clock, *bounds)
    lengths = [pace.total(before.step, after.step) for before, after in itertools.pairwise(snapshots)]
    stretches = tuple((np.eye(len(products))[index], length) for index, length in enumerate(lengths) if length)
    notes += [begins] if begins else []
    time = StretchTime(pace, first, last, every)
    return Gathered(alignment, snapshots, products, stretches, None, time, False, None, tuple(notes))


def _products(alignment: Alignment, origin: Snapshot, request: Request) -> NDArray[np.float64]:
    """Inner products of the basis, of all tensors that may be trained together; BatchNorm's statistics are not."""
    count = len(alignment.tensors[0].entries)
    gram, _ = accumulate(alignment, range(count), num_samples=DEFAULT_SAMPLE, resources=request.resources)
    trained = trained_in(origin)
    judged = [not is_batch_norm_statistic(tensor.name) and trained.get(tensor.name, True) for tensor in alignment.tensors]
    return np.asarray(gram.matrix[np.array(judged) | (not any(judged))].sum(axis=0))
