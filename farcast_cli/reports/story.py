"""The numbers of a report: all that a forecaster says of its run, by the same functions that decide. No words, no drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.advice import advice
from farcast_cli.errors import FarcastError
from farcast_cli.forecast.backtest import needed_direction
from farcast_cli.forecast.history import made_leaps
from farcast_cli.forecast.judgement import directions, report_backtest, tensor_errors
from farcast_cli.forecast.state_ledger import known_leaps
from farcast_cli.forecast.timeline import evenly
from farcast_cli.forecast.worth import span_of, worth_of
from farcast_cli.prediction import proposed
from farcast_cli.run.losses import LOSS_KINDS, losses_of
from farcast_cli.run.trajectory import discover

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.backtest import Needed
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.judgement import BacktestReport, Direction, TensorError
    from farcast_cli.forecast.ledger import Leap
    from farcast_cli.forecast.state_ledger import Ledgers
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.request import Outcome, Request
    from farcast_cli.run.losses import LossKind, LossLog, Points

MAX_MOVES = 32  # of a heat map: more cells are smaller than a reader can tell apart, and make a page of megabytes
MAX_LOSSES = 2000  # of a kind: more than a picture has pixels, and a page of megabytes


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `predict` would do without a horizon, and why."""

    purpose: Purpose
    outcome: Outcome
    needed: Needed
    """What S must exceed at this horizon."""
    next_step: str
    """What to type, or what else to do."""
    note: str = ""
    """Why the end of the run is not known, if its files could not be read."""


@dataclass(frozen=True, slots=True)
class Moves:
    """The moves between neighbouring snapshots at `steps` (M + 1,), and the `cosines` between them (M, M)."""

    steps: tuple[int, ...]
    cosines: NDArray[np.float64]
    every: int
    """How many of the history's moves one of these spans."""

    @property
    def next_mean(self) -> float:
        """The mean cosine of a move and the next one; nan where there are none."""
        return _mean(np.diag(self.cosines, 1))

    @property
    def far_mean(self) -> float:
        """The mean cosine of moves that lie at least half the history apart."""
        count = len(self.cosines)
        return _mean(self.cosines[np.triu_indices(count, max(1, count // 2))])


@dataclass(frozen=True, slots=True)
class Course:
    """The losses of the run, and its leaps as (step at which training resumed, horizon)."""

    losses: LossLog | None = None
    leaps: tuple[tuple[int, int], ...] = ()
    worth: Worth | None = None
    """What the losses say of the last leap."""
    why_none: str = ""
    """Why there are no losses."""
    note: str = ""
    """How many of the losses these are, if not all."""

    def points(self, kind: LossKind) -> Points:
        """The losses of a kind by step."""
        return self.losses.of(kind) if self.losses else ()


@dataclass(frozen=True, slots=True)
class Story:
    """All numbers of a report."""

    fitted: Fitted
    proposal: Proposal
    moves: Moves
    directions: tuple[Direction, ...]
    backtest: BacktestReport
    tested: tuple[int, str]
    """The horizon and the method of the tensors' errors: the tested horizon nearest to the proposed one."""
    tensors: tuple[TensorError, ...]
    """The most exact first; those that did not move last."""
    course: Course


def tell(fitted: Fitted, request: Request, course: Course | None = None) -> Story:
    """The story of a run. Reads no tensor; of the run's files only headers, if they are still there.

    Args:
        request: what `predict` would be asked for; its horizons are not given.
        course: the losses and leaps; by default there are none.
    """
    proposal = propose(fitted, request)
    device = request.resources.device
    backtest = report_backtest(fitted, (), method=None, purpose=request.purpose, clock=None, device=device)
    horizon = min(backtest.decisions, key=lambda one: (abs(one - proposal.outcome.horizon), one))
    method = backtest.decisions[horizon][0]
    tensors = tensor_errors(fitted, method, horizon, request.purpose, device=device)
    return Story(
        fitted,
        proposal,
        moves_of(fitted),
        directions(fitted),
        backtest,
        (horizon, method),
        tuple(sorted(tensors, key=lambda one: (math.isnan(one.ratio), one.ratio, one.name))),
        course or Course(why_none="nobody looked for them"),
    )


def propose(fitted: Fitted, request: Request) -> Proposal:
    """What `predict` would do. If the run's files are gone, its end is not known, and a note says so."""
    judged, note = proposed(fitted, request)
    outcome, task, steady = judged.outcomes[0], judged.tasks[0], fitted.steadiness()
    is_written = outcome.decision.verdict == "forecast"
    option = " --for evaluation" if request.purpose == "evaluation" else ""
    return Proposal(
        request.purpose,
        outcome,
        needed_direction(steady, task),
        f"farcast predict{request.source}{option}" if is_written else advice(fitted, request, [outcome]),
        note,
    )


def moves_of(fitted: Fitted, *, most: int = MAX_MOVES) -> Moves:
    """The moves of a history; of many snapshots every second one enters, or every third, so that there are at most so many."""
    gram = fitted.judged()[0]
    every = -(-(gram.num_snapshots - 1) // most)
    chosen = gram if every == 1 else gram.restrict(range((gram.num_snapshots - 1) % every, gram.num_snapshots, every))
    return Moves(tuple(int(step) for step in chosen.steps), chosen.move_cosines(), every)


def course_of(fitted: Fitted, *, losses: Path | None, ledgers: Ledgers | None) -> Course:
    """The losses that the run logged, and the leaps that it resumed from.

    Args:
        losses: the log that the user names; by default it is looked for where trainers keep it.

    Raises:
        FarcastError: the named log cannot be read.
    """
    try:
        known = fitted.provenance
        trajectory = discover(fitted.directory, pattern=known.pattern, rule=fitted.rule, weights=known.weights)
        recorded = known_leaps(ledgers, trajectory).leaps
        made = _in_turn(made_leaps(trajectory, recorded))
    except FarcastError as error:
        return Course(why_none=str(error))
    log = losses_of(trajectory, losses)
    leaps = tuple((leap.resumes_after, leap.valid_step - leap.origin_step) for leap in made)
    worth = worth_of(log, span_of(recorded, made[-1].origin_step, made[-1].resumes_after)) if made else None
    why_none = log.unread if log is not None and log.unread else "farcast found no log of them (--losses FILE names one)"
    return _shown(log, leaps, worth) if log else Course(None, leaps, worth, why_none)


def _shown(log: LossLog, leaps: tuple[tuple[int, int], ...], worth: Worth | None) -> Course:
    """A course with so many losses as a report can show; its worth is that of all."""
    longest = max(len(log.of(kind)) for kind in LOSS_KINDS)
    kept = replace(log, training=_thinned(log.training), evaluation=_thinned(log.evaluation))
    note = f" {longest:,} losses are too many to show: of each kind, {MAX_LOSSES:,} spread evenly are here."
    return Course(kept, leaps, worth, note=note if longest > MAX_LOSSES else "")


def _thinned(points: Points) -> Points:
    return tuple(points[index] for index in evenly(len(points), MAX_LOSSES)) if points else ()


def _in_turn(leaps: Sequence[Leap]) -> list[Leap]:
    """The leaps that a run can have made one after another: of several from one snapshot, the last."""
    return [
        leap
        for number, leap in enumerate(leaps, 1)
        if all(later.origin_step >= max(leap.resumes_after, leap.origin_step + 1) for later in leaps[number:])
    ]


def _mean(values: NDArray[np.float64] | Sequence[float]) -> float:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else float("nan")
