"""One call: measure, decide, write.

Nothing but the newest snapshot is needed from the run's folder once there is a memory. Everything is published together: the
checkpoint, the memory and the ledger's line, or none of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from farcast_cli.checkpoint.convert import settle
from farcast_cli.checkpoint.plan import with_modes
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.engine.write import Engine, total_bytes, write_forecasts
from farcast_cli.errors import SnapshotError, UsageError, shell_word
from farcast_cli.files.hidden import clear_left
from farcast_cli.files.place import check_outside, sidecar_of
from farcast_cli.files.reading import portable, relative
from farcast_cli.files.staged import staging
from farcast_cli.folder import note_on
from farcast_cli.forecast.backtest import Decision
from farcast_cli.forecast.memory import MemoryRecord, changed, check_memory_ours, memory_of, plan_memory
from farcast_cli.forecast.momentum import remember
from farcast_cli.forecast.state_ledger import known_leaps
from farcast_cli.forecast.steering import PROBE, Losses, heard
from farcast_cli.forecast.worth import span_of, worth_of
from farcast_cli.leaps.ask import Leapt
from farcast_cli.leaps.decision import Heard, Situation
from farcast_cli.leaps.evidence import gathered, known_memory
from farcast_cli.planning import check_ledger_of, claim, place_of, prepare, start_at
from farcast_cli.publish import Publication, judged_origin, only, record_leaps, write_all, write_candidate
from farcast_cli.records import LeaptOn, MomentumEntry
from farcast_cli.request import Outcome
from farcast_cli.run.losses import losses_of
from farcast_cli.run.trajectory import discover
from farcast_cli.run.trust import StepRule
from farcast_cli.second_copies import marks_of_averages
from farcast_cli.state.advance import HISTORY
from farcast_cli.trainers.base import unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.files.staged import Staging
    from farcast_cli.forecast.memory import Memory
    from farcast_cli.forecast.momentum import Momentum
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.leaps.ask import Ask
    from farcast_cli.leaps.evidence import Gathered
    from farcast_cli.progress import Progress
    from farcast_cli.request import Prepared, Start
    from farcast_cli.run.trajectory import Trajectory


UNASKED = "--eval-cmd was not run: there was no training since the last call; it runs after more training"


def leap(ask: Ask, progress: Progress) -> Leapt:
    """Leap from the newest snapshot of a run, or say why not; the memory has one stretch more either way.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: nothing was published.
    """
    chosen = ask.selection
    trajectory = discover(ask.directory, **chosen.entries)
    start = start_at(ask.directory, trajectory.origin, len(trajectory.snapshots) - 1, ask.request)
    place_of(
        ask.request, start, 1, settle(start.origin, ask.request.layout, inner=ask.request.place)
    )  # a bad name is refused at once
    place = memory_of(ask.folder, ask.directory, chosen.pattern)
    check_outside(place, ask.directory)
    if not ask.request.dry_run:
        clear_left(place)
    memory, notes = known_memory(place, trajectory)
    if ask.request.output is None and (odd := note_on(place.parent, ask.directory)):
        notes.append(odd)
    is_again = memory is not None and memory.began_at(trajectory.origin)
    if memory and is_again and (memory.forecast or not ask.is_forced):
        return _again(memory, ask, trajectory.origin.path)
    found = gathered(ask, trajectory, memory, notes)
    return _Call(ask, trajectory, found, progress, start=start, place=place).run()


def _again(memory: Memory, ask: Ask, origin: Path) -> Leapt:
    """The last answer once more: no training has happened since."""
    record, path = memory.record, memory.forecast
    if path is not None and not ask.request.dry_run:
        clear_left(path)
        clear_left(sidecar_of(path, is_file=True))
    if path is not None and (lost := changed(path, record)):
        raise UsageError(
            f"{lost}, and there was no training since then",
            hint=f"continue from {shell_word(record.origin)}, or remove {shell_word(memory.path)} to start a new memory",
        )
    verdict, reason = ("forecast", "") if path else ("abstain", record.reason)
    decision = Decision(verdict, math.nan, math.nan, reason)  # type: ignore[arg-type]
    outcome = Outcome(
        record.horizon, record.origin_step, "momentum", decision, path=path, rule=StepRule(record.step_from, record.unit)
    )
    return Leapt(
        outcome,
        record.momentum,
        math.nan,
        is_again=True,
        every=ask.every or record.every,
        clock=record.clock,
        origin=origin,
        notes=(UNASKED,) if ask.request.evaluator else (),
    )


def _earlier_averages(found: Gathered, trajectory: Trajectory) -> Mapping[str, str] | None:
    """Marks of the averages at an earlier snapshot: the memory's, or those of what was saved before the origin."""
    known = found.memory.record.averages if found.memory else {}
    before = (*found.snapshots[:-1], *trajectory.snapshots[-2:-1])
    return known or next(filter(None, map(marks_of_averages, before)), None)


class _Call:
    """A call that has new training behind it."""

    def __init__(
        self, ask: Ask, trajectory: Trajectory, found: Gathered, progress: Progress, *, start: Start, place: Path
    ) -> None:
        self._ask, self._request, self._place, self._found = ask, ask.request, place, found
        self._trajectory, self._progress = trajectory, progress
        self._told: list[str] = []
        self._check_memory = partial(check_memory_ours, run=ask.directory)
        self._container = settle(trajectory.origin, ask.request.layout, inner=ask.request.place)
        before = found.memory.record if found.memory else None
        self._start = replace(start, averages=_earlier_averages(found, trajectory))
        self._after = remember(found.known, found.stretches, found.products) if found.stretches or found.known else None
        self._length = found.stretches[-1][1] if found.stretches else before.length if before else 0.0
        self._losses = before.losses if before else Losses()

    def run(self) -> Leapt:
        check_ledger_of(self._request, self._ask.directory)
        with staging() as outputs:
            written = None if self._request.dry_run else outputs.add(self._place, check=self._check_memory)
            said = self._probe(written) if written else Heard(self._losses)
            situation = Situation(self._ask, self._trajectory, self._start, self._found, self._after, said)
            momentum = situation.steered()
            gain, reason = situation.decide(momentum)
            outcome = self._outcome(gain, reason, said)
            if written:
                with unchanged((*self._found.snapshots, self._start.origin), copied=self._start.origin):
                    outcome, files = self._write(outputs, outcome, gain) if gain else (outcome, ())
                    self._remember(written, outcome, momentum, said.losses, files)
                self._progress("sync to disk", 0)
        return Leapt(
            outcome,
            momentum,
            self._after.cosine if self._after else math.nan,
            is_again=False,
            every=self._found.time.every,
            clock=self._found.time.pace.clock,
            origin=self._start.origin.path,
            is_last=situation.is_near_end,
            notes=(*situation.notes(outcome), *self._told),
            signal=said.signal,
            worth=self._worth(),
        )

    def _worth(self) -> Worth | None:
        """What the losses that the run logged say of the last leap."""
        memory = self._found.memory
        if memory is None or memory.forecast is None:
            return None
        last, known = memory.record, known_leaps(self._request.ledgers, self._trajectory).leaps
        span = span_of(known, last.origin_step, last.landing_step)
        return worth_of(losses_of(self._trajectory, self._ask.losses), span)

    def _probe(self, written: Path) -> Heard:
        """What the user's command says of the weights ahead and behind, in the direction remembered before the last stretch.

        Beside the loss at the origin itself: steering.py says what the three tell. The origin comes last, so that a command
        that fails on forecasts fails at once.
        """
        evaluator, known = self._request.evaluator, self._found.known
        if evaluator is None or known is None:
            return Heard(self._losses)
        name = self._container.renamed(f"{self._stem}-probe", self._start.origin)
        logs = self._place.with_name(f"{self._stem}-leap.eval")
        variables = {"ORIGIN_STEP": self._start.origin.step, "VALID_STEP": self._start.origin.step}
        moves = [known.mean * self._found.time.ahead * share for share in (PROBE, -PROBE)]
        prepared = self._prepared(moves, [0, 0])  # the weights alone: no counter moves
        with evaluator.judge(logs, variables, lambda what: self._progress(f"evaluate {what}", 0)) as judge:
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
        losses, signal = heard(self._losses, ahead=ahead, behind=behind, origin=origin)
        return Heard(losses, tuple(trials.values()), signal, ahead > behind)

    def _outcome(self, gain: float, reason: str, said: Heard) -> Outcome:
        decision = Decision("forecast" if gain else "abstain", math.nan, math.nan, reason)
        horizon = max(1, round(gain * self._found.time.every)) if gain else 0
        rule = self._trajectory.rule
        return Outcome(horizon, self._start.origin.step, "momentum", decision, trials=said.trials, rule=rule)

    @property
    def _stem(self) -> str:
        return self._start.origin.path.stem if self._start.origin.path.is_file() else self._start.origin.path.name

    def _inputs(self, moves: Sequence[NDArray[np.float64]], *, bare: bool = False) -> Inputs:
        """The files that are read, and over them the moves (R,) of the origin's weights; a bare one is the move alone."""
        found, tensors = self._found, self._found.alignment.tensors
        stacked, num_files = [np.tile(move, (len(tensors), 1)) for move in moves], len(tensors[0].entries)
        linear = _over_memory(stacked, num_files) if found.has_moves else LinearMap.from_updates(stacked, num_files - 1)
        return Inputs(found.alignment, replace(linear, bare=frozenset(range(len(moves))) if bare else frozenset()))

    def _prepared(self, moves: Sequence[NDArray[np.float64]], horizons: Sequence[int]) -> Prepared:
        """Forecasts planned, each a move (R,) of the origin's weights."""
        request = self._request
        return prepare(
            request,
            self._start,
            self._trajectory.snapshots[-HISTORY:],
            self._inputs(moves),
            horizons,
            container=self._container,
            paths=[place_of(request, self._start, horizon, self._container) for horizon in horizons],
            snapshots=self._found.snapshots,
        )

    def _write(self, outputs: Staging, outcome: Outcome, gain: float) -> tuple[Outcome, tuple[dict[str, Any], ...]]:
        """Write the checkpoint with its sidecar, and note the leap in the ledger; also the files that it consists of."""
        assert self._after is not None  # noqa: S101 - a gain has a direction
        request, run = self._request, self._ask.directory
        prepared = self._prepared([gain * self._found.time.ahead * self._after.mean], [outcome.horizon])
        claim(prepared.paths, run, request, is_file=self._container.is_one_file)
        count, share = self._after.momentum.count, self._after.momentum.share
        work = Publication(request, run, LeaptOn(stretches=count), outputs, self._progress, self._told)
        momentum = MomentumEntry(gain=gain, share=share, stretches=count)
        ((finished, content),) = write_all(work, prepared, [outcome], phase="leap", momentum=momentum)
        record_leaps(work, [finished], prepared.origin)
        return finished, tuple(dict(file) for file in content.files)

    def _remember(
        self, written: Path, outcome: Outcome, momentum: Momentum, losses: Losses, files: tuple[dict[str, Any], ...]
    ) -> None:
        """Write the memory: the mean move of a stretch, and the landing where it is not the forecast."""
        home, origin, path = self._place.parent, self._start.origin, outcome.path
        moved = outcome.valid_step if self._request.counters == "advance" else outcome.origin_step
        record = _recorded(
            run=relative(self._ask.directory, home),
            origin=portable(origin.path.name),
            origin_step=origin.step,
            origin_digest=origin.full_digest,
            pattern=self._ask.selection.pattern,
            step_from=self._ask.selection.rule.source,
            unit=self._ask.selection.rule.unit,
            weights=self._ask.selection.weights,
            strides={t.name: t.entries[-1].strides for t in self._found.alignment.tensors if t.entries[-1].strides},
            averages=dict(marks_of_averages(origin)),
            landing_step=moved if path else origin.step,
            forecast=relative(path, home) if path else "",
            files=files,
            horizon=outcome.horizon,
            every=self._found.time.every,
            rate=self._found.time.rate,
            length=self._length or 1.0,
            clock=self._found.time.pace.clock,
            count=momentum.count,
            gain=momentum.gain,
            made=momentum.made,
            foretold=momentum.foretold,
            reason=outcome.decision.reason,
            **asdict(losses),
        )
        (plan,) = with_modes([plan_memory(self._found.alignment, record, holds_landing=path is None)], origin)
        mean = self._after.mean * record.length if self._after else np.zeros(len(self._found.products))
        engine = Engine(self._inputs([mean], bare=True), self._request.resources)
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
