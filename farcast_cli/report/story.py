"""The numbers of a report: all that a forecaster says of its run, by the same functions that decide. No words, no drawing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.advice import advice
from farcast_cli.errors import FarcastError
from farcast_cli.forecast.backtest import judge_direction, needed_direction
from farcast_cli.forecast.forecaster_file import reopen
from farcast_cli.forecast.judgement import directions, report_backtest, tensor_errors
from farcast_cli.forecast.timeline import evenly
from farcast_cli.predict import judge
from farcast_cli.trainers import trainer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.backtest import Needed
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.judgement import BacktestReport, Direction, TensorError
    from farcast_cli.request import Outcome, Request

MAX_MOVES = 32  # of a heat map: more cells are smaller than a reader can tell apart, and make a page of megabytes


@dataclass(frozen=True, slots=True)
class Proposal:
    """What `predict` would do without a horizon, and why."""

    purpose: Purpose
    outcome: Outcome
    needed: Needed
    """What S must exceed at this horizon."""
    is_steady: bool
    """Whether S and p allow it, before the back-test ratio is asked."""
    is_over: bool
    """Whether the run has no step left to leap over."""
    next_step: str
    """What to type, or what else to do."""
    note: str = ""
    """Why the end of the run is not known, if its files could not be read."""


@dataclass(frozen=True, slots=True)
class Moves:
    """The moves between neighbouring snapshots at `steps` (M + 1,), and the `cosines` between them (M, M)."""

    steps: tuple[int, ...]
    cosines: NDArray[np.float64]
    num_snapshots: int
    """Of the history. Of a long one some enter, evenly chosen."""

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
    """The losses of the run as (step, loss), and its leaps as (step at which training resumed, horizon)."""

    losses: tuple[tuple[int, float], ...] = ()
    leaps: tuple[tuple[int, int], ...] = ()
    why_none: str = ""
    """Why there are no losses."""


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
    """The story of a run. Reads no tensor; of the run's files only the newest snapshot's headers, if it is still there.

    Args:
        request: what `predict` would be asked for; its horizons are not given.
        course: the losses and leaps; the ones in the trainer's own log by default.
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
        course_of(fitted) if course is None else course,
    )


def propose(fitted: Fitted, request: Request) -> Proposal:
    """What `predict` would do. If the run's files are gone, its end is not known, and a note says so."""
    note = ""
    try:
        judged = judge(fitted, request)
    except FarcastError as error:
        judged, note = judge(fitted, replace(request, counters="keep")), str(error)
    outcome, task, steady = judged.outcomes[0], judged.tasks[0], fitted.steadiness()
    is_written = outcome.decision.verdict == "forecast"
    option = " --for evaluation" if request.purpose == "evaluation" else ""
    return Proposal(
        request.purpose,
        outcome,
        needed_direction(steady, task),
        judge_direction(steady, task)[0],
        judged.start is not None and judged.start.ends_before(1),
        f"farcast predict{request.source}{option}" if is_written else advice(fitted, request, [outcome]),
        note,
    )


def moves_of(fitted: Fitted, *, most: int = MAX_MOVES) -> Moves:
    """The moves of a history, at most so many."""
    gram = fitted.judged()[0]
    keep = evenly(gram.num_snapshots, most + 1)
    chosen = gram if len(keep) == gram.num_snapshots else gram.restrict(keep)
    return Moves(tuple(int(step) for step in chosen.steps), chosen.move_cosines(), gram.num_snapshots)


def course_of(fitted: Fitted) -> Course:
    """The losses in the trainer's log, and the leaps that its newest snapshot is marked with."""
    try:
        newest = reopen(fitted, len(fitted.steps) - 1)
        trainer = trainer_of(newest)
        losses = tuple((step, loss) for step, loss in trainer.logged_losses(newest) if math.isfinite(loss))
        leaps = tuple((mark.step, mark.valid_step - mark.origin_step) for mark in trainer.marks(newest))
    except FarcastError as error:
        return Course(why_none=str(error))
    return Course(
        losses, leaps, "" if losses else "the snapshots contain no losses; only a Hugging Face Trainer's log has them"
    )


def _mean(values: NDArray[np.float64] | Sequence[float]) -> float:
    known = [float(value) for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else float("nan")
