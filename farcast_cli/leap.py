"""One leap in a loop: the newest snapshot of a run, its memory, a decision, a checkpoint to resume from, a new memory.

Nothing but the newest snapshot is needed from the run's folder once there is a memory. Everything is published together: the
checkpoint, the memory and the ledger's line, or none of them.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from farcast_cli.checkpoint.convert import settle
from farcast_cli.checkpoint.plan import with_modes
from farcast_cli.choices import DEFAULT_FOLDER, DEFAULT_SAMPLE
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.engine.write import Engine, total_bytes, write_forecasts
from farcast_cli.errors import SnapshotError, UsageError, shell_word
from farcast_cli.evaluation.judge import Judge, Trial
from farcast_cli.files.hidden import clear_left
from farcast_cli.files.place import check_outside, sidecar_of
from farcast_cli.files.reading import portable, relative
from farcast_cli.files.staged import staging
from farcast_cli.forecast.accumulate import accumulate
from farcast_cli.forecast.backtest import Decision
from farcast_cli.forecast.ledger import check_ledger, read_leaps, recorded, since_last_leap
from farcast_cli.forecast.memory import (
    Memory,
    MemoryRecord,
    basis_of,
    changed,
    check_memory_ours,
    memory_of,
    plan_memory,
    read_memory,
    remembered,
)
from farcast_cli.forecast.momentum import AGREES, Momentum, Remembered, remember, steered
from farcast_cli.forecast.steering import PROBE, Losses, heard
from farcast_cli.forecast.timeline import evenly
from farcast_cli.planning import check_place, place_of, plan_forecast
from farcast_cli.publish import finish, judged_origin, leap_of, only, stage, write_candidate
from farcast_cli.request import Outcome, Prepared, Request
from farcast_cli.results import LeaptOn, MomentumEntry
from farcast_cli.run.alignment import align, since_last_change
from farcast_cli.run.pace import Pace
from farcast_cli.run.trajectory import Trajectory, discover
from farcast_cli.sidecar import compose, write_sidecar
from farcast_cli.state.advance import HISTORY
from farcast_cli.state.rates import rate_at, read_pace
from farcast_cli.tensors import is_batch_norm_statistic
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.base import unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import ClockName
    from farcast_cli.files.staged import Staging
    from farcast_cli.forecast.memory import MemoryBasis
    from farcast_cli.publish import Progress
    from farcast_cli.run.alignment import Alignment
    from farcast_cli.run.selection import Selection
    from farcast_cli.trainers.base import Snapshot

MAX_HISTORY = 10  # snapshots that a first memory is made of: each is a file to read in full
LEFT_TO_TRAIN = 0.1  # of the run, after its last leap: a leap needs training after it
LEFT_TO_SETTLE = 0.5  # of what is left of a run whose counters advance
WITH_LOSS, WITHOUT_LOSS = 4.0, 1.0  # the largest gain: without a loss, nothing can tell a leap that harms
UNJUDGED = 1.0  # the largest gain while the loss has not been seen to change
FIRST_CALLS = 3  # stretches, up to which the notes for a beginner are said
WORTH = 0.1  # the smallest gain that is worth a restart
RISING = 1.01  # times the rate before
ADVISED = 50  # leaps in a run, and so a stretch of 2 % of it
"""Measured: 20 leaps gain less (docs/results.md)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What the user asks of a leap, beside what every forecast is asked."""

    request: Request
    selection: Selection
    every: int | None = None
    """Steps until the next leap; as many as since the last one if None."""
    gain: float | None = None
    """A fixed gain, in place of the steered one."""
    max_gain: float | None = None

    @property
    def limit(self) -> float:
        """The largest gain."""
        usual = WITHOUT_LOSS if self.request.evaluator is None else WITH_LOSS
        return usual if self.max_gain is None else self.max_gain

    @property
    def directory(self) -> Path:
        return self.selection.directory


@dataclass(frozen=True, slots=True)
class Leapt:
    """What came of a call: the outcome, the memory after it, and what a person should know."""

    outcome: Outcome
    momentum: Momentum
    cosine: float
    is_again: bool
    """The newest snapshot is the one that the last leap began at: nothing new was written."""
    every: int
    clock: ClockName
    origin: Path
    """The newest snapshot, from which training goes on where there is no leap."""
    is_last: bool = False
    """The run is so near its end that no leap will follow."""
    notes: tuple[str, ...] = ()
    signal: float = math.nan
    """Of the loss: the share of its usual fall that a stretch more in the remembered direction gives."""


def leap(ask: Ask, progress: Progress) -> Leapt:
    """Leap from the newest snapshot of a run, or say why not; the memory has one stretch more either way.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: nothing was published.
    """
    trajectory = discover(ask.directory, steps=ask.selection.steps, pattern=ask.selection.pattern)
    place = memory_of(_folder(ask.request), ask.directory)
    check_outside(place, ask.directory)
    if not ask.request.dry_run:
        clear_left(place)
    memory, notes = _known(place, trajectory, ask.selection.pattern)
    is_again = memory is not None and memory.began_at(trajectory.origin)
    if memory and is_again and (memory.forecast or not _is_forced(ask)):
        return _again(memory, ask, trajectory.origin.path)
    found = _gathered(ask, trajectory, memory, notes)
    return _Call(ask, trajectory, place, found, progress).run()


def _is_forced(ask: Ask) -> bool:
    return ask.request.even_if_worse or ask.gain is not None


def _folder(request: Request) -> Path:
    """Where forecasts and the memory lie: the folder that -o names, or that of the file that it names."""
    if request.output is None:
        return DEFAULT_FOLDER
    return Path(request.output) if request.output.endswith(os.sep) else Path(request.output).parent


def _known(place: Path, trajectory: Trajectory, pattern: str) -> tuple[Memory | None, list[str]]:
    """The memory of this run, and a note where there is one that is of no use."""
    memory = read_memory(place)
    if memory is None:
        return None, []
    run, origin = (place.parent / memory.record.run).resolve(), trajectory.origin
    if run != trajectory.directory.resolve():
        return None, [
            f"{place} remembers another run, {memory.record.run}, and starts again: give each run a folder of its own, -o DIR/"
        ]
    if pattern != memory.record.pattern:
        return None, [f"{place} remembers the run of --pattern {memory.record.pattern!r}: the memory starts again"]
    before = next((one for one in trajectory.snapshots[:-1] if one.step == memory.record.origin_step), None)
    if before is not None and not memory.began_at(before):
        return None, [f"{before.path.name} is not what it was at the last call: the memory starts again"]
    if origin.step <= memory.record.landing_step and not memory.began_at(origin):
        where = f"step {memory.record.landing_step}, and the newest snapshot is of step {origin.step}"
        return None, [f"the memory ends at {where}: it starts again"]
    return memory, []


def _again(memory: Memory, ask: Ask, origin: Path) -> Leapt:
    """The last answer once more: no training has happened since."""
    record, path = memory.record, memory.forecast
    if path is not None and not ask.request.dry_run:
        clear_left(path)
        clear_left(sidecar_of(path, is_file=True))
    if path is not None and (lost := changed(path, record)):
        raise UsageError(
            f"{lost}, and no training has happened since",
            hint=f"go on from {shell_word(record.origin)}, or remove {shell_word(memory.path)} to start a new memory",
        )
    verdict, reason = ("forecast", "") if path else ("abstain", record.reason)
    decision = Decision(verdict, math.nan, math.nan, reason)  # type: ignore[arg-type]
    outcome = Outcome(record.horizon, record.origin_step, "momentum", decision, path=path)
    return Leapt(
        outcome, record.momentum, math.nan, is_again=True, every=ask.every or record.every, clock=record.clock, origin=origin
    )


# --- what is read ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Time:
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
class _Gathered:
    """What a leap is computed from: aligned files, and over their basis the stretches and what was known before."""

    alignment: Alignment
    snapshots: tuple[Snapshot, ...]
    products: NDArray[np.float64]
    stretches: tuple[tuple[NDArray[np.float64], float], ...]
    known: Remembered | None
    time: _Time
    has_moves: bool
    memory: Memory | None
    notes: tuple[str, ...] = field(default=())


def _gathered(ask: Ask, trajectory: Trajectory, memory: Memory | None, notes: list[str]) -> _Gathered:
    chosen: dict[str, Any] = {"include": ask.selection.include, "exclude": ask.selection.exclude}
    if memory:
        basis = basis_of(memory, trajectory.origin, **chosen)
        if isinstance(basis, str):
            notes.append(f"{memory.path} cannot be used: {basis}: the memory starts again")
        else:
            first, last = memory.record.landing_step, trajectory.origin.step
            pace, every = _pace_since(memory, basis, ask, trajectory.origin)
            products = _products(basis.alignment, ask.request)
            unit = np.eye(len(products))
            known = remembered(memory, unit[-2])
            length = pace.total(first, last)  # 0 where the user asks again for a leap that was refused, or the rate was 0
            stretches = ((unit[int(basis.has_moves)], length),) if length else ()
            time = _Time(pace, first, last, every)
            return _Gathered(
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


def _from_history(ask: Ask, trajectory: Trajectory, notes: list[str]) -> _Gathered:
    """A first memory from the snapshots that are there, since the last leap that the run resumed from."""
    leaps = read_leaps(ask.request.ledger, trajectory.directory) if ask.request.ledger else []
    history = since_last_leap(trajectory, leaps, minimum=1).trajectory.snapshots
    history, begins = since_last_change(history, include=ask.selection.include, exclude=ask.selection.exclude, minimum=1)
    snapshots = tuple(history[index] for index in evenly(len(history), MAX_HISTORY))
    alignment = align(snapshots, include=ask.selection.include, exclude=ask.selection.exclude)
    products = _products(alignment, ask.request)
    first, last = snapshots[-2:][0].step, snapshots[-1].step
    every = ask.every or max(1, last - first)
    bounds = snapshots[0].step, last + every
    pace = read_pace(snapshots, ahead=every).reaching(*bounds).clocked(ask.request.clock, *bounds)
    lengths = [pace.total(before.step, after.step) for before, after in itertools.pairwise(snapshots)]
    stretches = tuple((np.eye(len(products))[index], length) for index, length in enumerate(lengths) if length)
    notes += [begins] if begins else []
    time = _Time(pace, first, last, every)
    return _Gathered(alignment, snapshots, products, stretches, None, time, False, None, tuple(notes))


def _products(alignment: Alignment, request: Request) -> NDArray[np.float64]:
    """Inner products of the basis, all tensors together but BatchNorm's statistics, whose scale is the data's."""
    count = len(alignment.tensors[0].entries)
    gram, _ = accumulate(alignment, range(count), num_samples=DEFAULT_SAMPLE, resources=request.resources)
    judged = [not is_batch_norm_statistic(tensor.name) for tensor in alignment.tensors]
    return np.asarray(gram.matrix[np.array(judged) | (not any(judged))].sum(axis=0))


# --- one call --------------------------------------------------------------------------------------------------------


class _Call:
    """A call that has new training behind it: measure, decide, write."""

    def __init__(self, ask: Ask, trajectory: Trajectory, place: Path, found: _Gathered, progress: Progress) -> None:
        self._ask, self._request, self._place, self._found = ask, ask.request, place, found
        self._trajectory, self._origin, self._progress = trajectory, trajectory.origin, progress
        self._target = settle(self._origin, ask.request.layout)
        self._after = remember(found.known, found.stretches, found.products) if found.stretches or found.known else None
        record = found.memory.record if found.memory else None
        self._length = found.stretches[-1][1] if found.stretches else record.length if record else 0.0
        self._every, self._ahead = found.time.every, found.time.ahead
        self._is_worse_ahead = False
        self._losses = record.losses if record else Losses()

    def run(self) -> Leapt:
        request = self._request
        if request.ledger is not None and not request.dry_run:
            check_outside(request.ledger, self._ask.directory, option="--ledger")
            check_ledger(request.ledger, self._ask.directory)
        with staging() as outputs:
            written = None if request.dry_run else outputs.add(self._place, check=check_memory_ours)
            trials, signal = self._probe(written) if written else ((), math.nan)
            momentum = self._steered(signal)
            gain, reason = self._decide(momentum, signal)
            outcome = self._outcome(gain, reason, trials)
            if written:
                with unchanged((*self._found.snapshots, self._origin), copied=self._origin):
                    outcome = self._write(outputs, outcome, gain) if gain else outcome
                    self._remember(written, outcome, momentum)
                self._progress("sync to disk", 0)
        cosine = self._after.cosine if self._after else math.nan
        return Leapt(
            outcome,
            momentum,
            cosine,
            is_again=False,
            every=self._every,
            clock=self._found.time.pace.clock,
            origin=self._origin.path,
            is_last=self._is_near_end,
            notes=self._notes(outcome, signal),
            signal=signal,
        )

    # --- the decision ---

    def _steered(self, signal: float) -> Momentum:
        """The gain moved by the loss where it could be measured, else by the share."""
        if self._after is None:
            return Momentum()
        momentum, limit = self._after.momentum, self._ask.limit
        if self._found.time.is_rising:  # no leap is made, so nothing is learned of leaps
            return momentum
        if math.isnan(signal):
            limit = limit if self._request.evaluator is None else min(limit, UNJUDGED)
            share = min(momentum.share, 0.0) if self._is_worse_ahead else momentum.share
            return steered(momentum, share, limit=limit)
        return steered(momentum, self._losses.signal(signal, momentum.share), limit=min(limit, self._losses.limit))

    def _decide(self, momentum: Momentum, signal: float) -> tuple[float, str]:
        """The gain to leap by, 0 for none; and why."""
        if self._after is None:
            return 0.0, self._alone()
        gain = momentum.gain if self._ask.gain is None else self._ask.gain
        if _is_forced(self._ask):
            return (max(gain, WORTH) if self._ask.gain is None else gain), "asked for"
        left, _ = self._steps_left() or (math.inf, math.inf)
        share = f"share {momentum.share:.2g}"
        against = self._losses.objection(signal, momentum.share)
        is_bent = not math.isnan(signal) and self._losses.limit <= min(momentum.gain, self._ask.limit)
        objections = (
            (math.isnan(momentum.share), "one stretch is remembered, and a leap needs two that agree"),
            (not self._ahead, "the learning rate is 0: no training is left to leap over"),
            (not self._moved, "the weights have not moved since the last call"),
            (math.isnan(signal) and self._is_worse_ahead, "the loss is higher ahead than behind"),
            (self._found.time.is_rising, "the learning rate still rises: leaps begin one stretch after the warm-up"),
            (
                self._is_near_end,
                f"{left} steps are left, and the last {LEFT_TO_TRAIN:.0%} of a run are for training",
            ),
            (bool(against), against),
            (
                math.isnan(signal) and momentum.share < AGREES,
                f"{share}: the last stretches made too little of the move that the memory foretold, needed {AGREES}",
            ),
            (
                self._ask.limit < WORTH,
                f"the largest gain is {self._ask.limit:g}, and under {WORTH} a leap is not worth a restart",
            ),
            (
                gain < WORTH and is_bent,
                f"gain {gain:.2g}: a longer leap would lift the loss by more than it usually changes",
            ),
            (gain < WORTH and not math.isnan(signal), f"gain {gain:.2g}: the loss spoke against the last leaps, {share}"),
            (gain < WORTH, f"gain {gain:.2g}: training took back the last leaps, {share}"),
        )
        objection = next((text for holds, text in objections if holds), None)
        if self._request.counters == "advance":  # a leap over the end could not settle
            gain = min(gain, LEFT_TO_SETTLE * left / self._every)
        held = ", held back by the curvature of the loss" if is_bent else ""
        return (0.0, objection) if objection else (gain, f"gain {gain:.2g}{held}, {share}")

    def _alone(self) -> str:
        """Why there is no stretch yet."""
        before = len(self._trajectory.snapshots) - 1
        known = f", and the {before} before it are not compared across the last leap" if before else ""
        return f"one snapshot to begin with{known}: a leap needs a stretch of training to continue"

    @property
    def _moved(self) -> bool:
        """Whether training has moved the weights in the last stretch."""
        move = self._found.stretches[-1][0] if self._found.stretches else None
        return move is None or float(move @ self._found.products @ move) > 0

    @property
    def _is_near_end(self) -> bool:
        left = self._steps_left()
        return left is not None and left[0] < LEFT_TO_TRAIN * left[1]

    def _steps_left(self) -> tuple[int, int] | None:
        """Steps to the end of the run, and its length, where the trainer's state tells."""
        end = trainer_of(self._origin).end(self._origin)
        return None if end is None else (end[1] - self._origin.step, end[1])

    def _probe(self, written: Path) -> tuple[tuple[Trial, ...], float]:
        """What the user's command says of the weights ahead and behind, in the direction remembered before the last stretch.

        Beside the loss at the origin itself: steering.py says what the three tell. The origin comes last, so that a command
        that fails on forecasts fails at once.
        """
        evaluator, known = self._request.evaluator, self._found.known
        if evaluator is None or known is None:
            return (), math.nan
        name = self._target.renamed(f"{self._stem}-probe", self._origin)
        logs = self._place.with_name(f"{self._stem}-leap.eval")
        variables = {"ORIGIN_STEP": self._origin.step, "VALID_STEP": self._origin.step}
        moves = [known.mean * self._ahead * share for share in (PROBE, -PROBE)]
        prepared = self._prepared(moves, [0, 0])  # the weights alone: no counter moves
        with Judge(evaluator, logs, variables, lambda what: self._progress(f"evaluate {what}", 0)) as judge:
            for index, strength in enumerate((PROBE, -PROBE)):
                judge.wait(below=evaluator.num_jobs)
                candidate = written.parent / f"strength-{strength:g}" / name
                write_candidate(only(prepared, index), candidate, self._progress)
                judge.start(strength, candidate)
            judge.wait(below=evaluator.num_jobs)
            judge.start(0, judged_origin(prepared, written.with_name(name), self._progress))
            judge.wait(below=1)
            trials = {trial.strength: trial for trial in judge.trials}
        ahead, behind, origin = (trials[s].value * (-1 if evaluator.maximize else 1) for s in (PROBE, -PROBE, 0))
        self._is_worse_ahead = ahead > behind
        self._losses, signal = heard(self._losses, ahead=ahead, behind=behind, origin=origin)
        return tuple(trials.values()), signal

    def _outcome(self, gain: float, reason: str, trials: Sequence[Trial]) -> Outcome:
        decision = Decision("forecast" if gain else "abstain", math.nan, math.nan, reason)
        horizon = max(1, round(gain * self._every)) if gain else 0
        return Outcome(horizon, self._origin.step, "momentum", decision, trials=tuple(trials))

    def _notes(self, outcome: Outcome, signal: float) -> tuple[str, ...]:
        left = self._steps_left()
        advice = max(1, round(left[1] / ADVISED)) if left else None
        said = [f"{one.path.name} left out: {one.reason}" for one in self._trajectory.half_written]
        said += self._found.notes
        if outcome.trials and math.isnan(signal):
            said.append("the loss has not been seen to change yet, so the share steers")
        if self._request.dry_run and self._request.evaluator is not None:
            said.append("a dry run measures no loss: the real call may decide otherwise")
        count = self._after.momentum.count if self._after else 0
        if outcome.path and self._request.evaluator is None and count <= FIRST_CALLS:  # to say it once is enough
            said.append("no loss was measured, so nothing here can tell whether leaps lower it: --eval-cmd steers by the loss")
            if self._found.time.pace.clock == "steps":
                said.append(
                    "no learning rate is known, so a warm-up would not be seen: leaps in one put a run onto a worse path"
                )
        if advice and count and not advice / 2 <= self._every <= 2 * advice:
            said.append(f"stretches of {self._every} steps: leaps gained most at every 2 % of a run, here {advice} steps")
        return tuple(said)

    # --- writing ---

    @property
    def _stem(self) -> str:
        return self._origin.path.stem if self._origin.path.is_file() else self._origin.path.name

    def _prepared(self, moves: Sequence[NDArray[np.float64]], horizons: Sequence[int], *, bare: bool = False) -> Prepared:
        """Forecasts planned, each a move (R,) of the origin's weights; a bare one has no plan yet."""
        found, count = self._found, len(self._found.alignment.tensors)
        stacked = [np.tile(move, (count, 1)) for move in moves]
        linear = _over_memory(stacked, len(found.alignment.tensors[0].entries)) if found.has_moves else None
        if linear is None:
            linear = LinearMap.from_steps(stacked, len(found.alignment.tensors[0].entries) - 1)
        linear = replace(linear, bare=frozenset(range(len(moves))) if bare else frozenset())
        request = self._request
        engine = Engine(Inputs(found.alignment, linear), request.resources)
        index_of = {tensor.name: index for index, tensor in enumerate(found.alignment.tensors)}
        history = self._trajectory.snapshots[-HISTORY:]
        planned = [] if bare else [plan_forecast(history, h, request, index_of, self._target) for h in horizons]
        places = tuple(place_of(request, self._origin, h, Fraction(1), self._target) for h in horizons)
        plans, advanced = tuple(plan for _, plan in planned), tuple(moved for moved, _ in planned)
        return Prepared(engine, plans, advanced, self._target, places, found.snapshots, self._origin)

    def _write(self, outputs: Staging, outcome: Outcome, gain: float) -> Outcome:
        """Write the checkpoint with its sidecar, and note the leap in the ledger."""
        assert self._after is not None  # noqa: S101 - a gain has a direction
        request, is_file = self._request, self._target.is_file
        prepared = self._prepared([gain * self._ahead * self._after.mean], [outcome.horizon])
        (target,), (plan,) = prepared.targets, prepared.plans
        clear_left(target)
        clear_left(sidecar_of(target, is_file=True))
        check_place(target, self._ask.directory, overwrite=request.overwrite, is_file=is_file)
        place, note = stage(outputs, target, is_file=is_file, overwrite=request.overwrite)
        tally = write_forecasts([plan], [place], prepared.engine, progress=self._progress("leap", total_bytes(plan)))
        finished = finish(prepared, outcome, tally, 0)
        count, share = self._after.momentum.count, self._after.momentum.share
        momentum = MomentumEntry(gain=gain, share=share, stretches=count)
        on = LeaptOn(stretches=count)
        content = compose(prepared, finished, request, written=place, fitted_on=on, momentum=momentum)
        write_sidecar(place, note, content)
        self._files = tuple(dict(file) for file in content.files)
        if request.ledger is not None:
            line = leap_of(finished, self._ask.directory, request.counters)
            outputs.alongside(recorded(request.ledger, [line]))
        return finished

    def _remember(self, written: Path, outcome: Outcome, momentum: Momentum) -> None:
        """Write the memory: the mean move of a stretch, and the landing where it is not the forecast."""
        home, origin, path = self._place.parent, self._origin, outcome.path
        moved = outcome.valid_step if self._request.counters == "advance" else outcome.origin_step
        record = _recorded(
            run=relative(self._ask.directory, home),
            origin=portable(origin.path.name),
            origin_step=origin.step,
            origin_digest=origin.full_digest,
            pattern=self._ask.selection.pattern,
            strides={t.name: t.entries[-1].strides for t in self._found.alignment.tensors if t.entries[-1].strides},
            landing_step=moved if path else origin.step,
            forecast=relative(path, home) if path else "",
            files=self._files if path else (),
            horizon=outcome.horizon,
            every=self._every,
            rate=self._found.time.rate,
            length=self._length or 1.0,
            clock=self._found.time.pace.clock,
            count=momentum.count,
            gain=momentum.gain,
            made=momentum.made,
            foretold=momentum.foretold,
            reason=outcome.decision.reason,
            **asdict(self._losses),
        )
        (plan,) = with_modes([plan_memory(self._found.alignment, record, holds_landing=path is None)], origin)
        mean = self._after.mean * record.length if self._after else np.zeros(len(self._found.products))
        engine = self._prepared([mean], [0], bare=True).engine
        write_forecasts([(plan,)], [written], engine, progress=self._progress("memory", total_bytes((plan,))))


def _recorded(**numbers: Any) -> MemoryRecord:
    try:
        return MemoryRecord(**numbers)
    except ValidationError as error:
        what = error.errors()[0]
        raise SnapshotError(f"the memory cannot hold {what['loc'][0]} = {what['input']}: {what['msg']}") from error


def _over_memory(moves: Sequence[NDArray[np.float64]], num_files: int) -> LinearMap:
    """Moves (K, R) over the memory's own moves (the basis vector w_0 of gram.py) and the increment from landing to origin.

    The increment from the memory's file to the landing is no move of anything, and has no share in them.
    """
    stacked = np.stack(moves)
    weights = np.zeros((*stacked.shape[:2], num_files))
    weights[..., 0] = stacked[..., -2]
    weights[..., 1] = -stacked[..., 1]
    nothing = np.zeros(stacked.shape[:2])
    return LinearMap(weights, nothing, nothing, num_files - 1, moves=frozenset({0}))
