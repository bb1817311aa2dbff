"""Where a run's own history begins: after the last leap that it resumed from, as its snapshots tell.

A leap is movement that training did not make. A forecaster fitted across one would be judged by its own forecasts, so `fit`
reads only what came after the last leap that the run resumed from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.errors import FarcastError, TooFewSnapshotsError
from farcast_cli.forecast.accumulate import accumulate
from farcast_cli.forecast.state_ledger import known_leaps
from farcast_cli.forecast.worth import span_of, worth_of
from farcast_cli.remote.mirror import opened
from farcast_cli.run.alignment import align
from farcast_cli.run.intervals import odd_gaps, usual_interval
from farcast_cli.run.steps import StepList
from farcast_cli.run.trajectory import MIN_SNAPSHOTS, open_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.forecast.ledger import Leap
    from farcast_cli.forecast.state_ledger import Ledgers
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.run.losses import LossLog
    from farcast_cli.run.steps import StepRange
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot

NUM_COMPARED = 1_024  # elements per tensor, enough to tell a forecast from a snapshot


@dataclass(frozen=True, slots=True)
class History:
    """The part of a trajectory that a forecaster may learn from: all of it, or what came after the last leap."""

    trajectory: Trajectory
    leap: Leap | None
    num_before: int


def since_last_leap(trajectory: Trajectory, leaps: Sequence[Leap], *, minimum: int) -> History:
    """The snapshots since the last leap that the run resumed from.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` of them.
    """
    made = made_leaps(trajectory, leaps)
    if not made:
        return History(trajectory, None, 0)
    last = made[-1]
    later = tuple(snapshot for snapshot in trajectory.snapshots if snapshot.step > last.resumes_after)
    if len(later) < minimum:
        raise _too_few_since(trajectory, last, len(later), minimum)
    return History(replace(trajectory, snapshots=later), last, len(trajectory.snapshots) - len(later))


def made_leaps(trajectory: Trajectory, leaps: Sequence[Leap]) -> list[Leap]:
    """The leaps that the run resumed from, of those that are known."""
    made: list[Leap] = []
    for leap in leaps:
        landed = made[-1].resumes_after if made else -1
        if _is_known_by_mark(leap, trajectory) or resumed_from(leap, trajectory, landed=landed):
            made.append(leap)
    return made


def _is_known_by_mark(leap: Leap, trajectory: Trajectory) -> bool:
    return leap.is_certain and trajectory.steps[-1] > leap.resumes_after


def _too_few_since(trajectory: Trajectory, leap: Leap, num_later: int, minimum: int) -> TooFewSnapshotsError:
    return TooFewSnapshotsError(
        f"{trajectory.directory}: {num_later} snapshots since the leap to step {leap.resumes_after}"
        f" ({leap.name}), and fit needs {minimum}",
        hint="continue training and fit again, or select the history with --steps FROM:TO",
    )


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of the leaps of a run: which were recorded, where its history begins, and what a person should know."""

    history: History
    leaps: tuple[Leap, ...]
    unused: tuple[Leap, ...] = ()
    """Leaps of the run that were not looked at, since the user chose the steps."""
    cautions: tuple[str, ...] = ()

    def worth(self, losses: LossLog | None) -> Worth | None:
        """What the run's losses say of the last leap that it resumed from."""
        leap = self.history.leap
        return worth_of(losses, span_of(self.leaps, leap.origin_step, leap.resumes_after)) if leap else None

    @property
    def problem(self) -> TooFewSnapshotsError | None:
        """Why `fit` refuses the run, if it does so because of a leap."""
        trajectory, leap = self.history.trajectory, self.history.leap
        count = len(trajectory.snapshots)
        return _too_few_since(trajectory, leap, count, MIN_SNAPSHOTS) if leap and count < MIN_SNAPSHOTS else None


def past_of(
    trajectory: Trajectory, ledgers: Ledgers | None, *, chosen: StepRange | StepList | None = None, minimum: int
) -> Past:
    """Look up the leaps of a run, and take what came after the last one that it resumed from.

    Args:
        chosen: the steps that the user chose, if any; they override the ledgers.

    Raises:
        FileFormatError: the ledger cannot be read.
        TooFewSnapshotsError: fewer than `minimum` snapshots since the leap.
    """
    known = known_leaps(ledgers, trajectory)
    if chosen:
        gaps = () if isinstance(chosen, StepList) else _cautions_of_gaps(trajectory, known.leaps)
        return Past(History(trajectory, None, 0), known.leaps, known.leaps, (*known.notes, *gaps))
    history = since_last_leap(trajectory, known.leaps, minimum=minimum)
    cautions = (*_cautions_of_short_leaps(history, known.leaps), *_cautions_of_gaps(history.trajectory, known.leaps))
    return Past(history, known.leaps, cautions=(*known.notes, *cautions))


def _cautions_of_short_leaps(history: History, leaps: Sequence[Leap]) -> Iterator[str]:
    """Of leaps that the run may have resumed from, and that its snapshots cannot tell from training."""
    steps = history.trajectory.steps
    if len(steps) < 2:  # noqa: PLR2004 - a distance takes two
        return
    usual = usual_interval(steps)
    within = [leap for leap in leaps if leap != history.leap and steps[0] <= leap.resumes_after < steps[-1]]
    short = [leap for leap in within if leap.valid_step - leap.origin_step < usual]
    if short:
        first = next(step for step in steps if step > short[-1].resumes_after)
        many = len(short) > 1
        yield (
            f"caution: {len(short)} leap{'s' * many} in the ledger {'are' if many else 'is'} shorter than the distance between snapshots"
            f" ({usual} steps): the snapshots cannot show whether the run resumed from {'them' if many else 'it'}. If it did, fit"
            f" counts {'them' if many else 'it'} as training, and its tests are too favourable: use --steps {first}: when"
            f" {MIN_SNAPSHOTS} snapshots have come since the last leap, or judge forecasts by a loss (--eval-cmd)"
        )


def _cautions_of_gaps(trajectory: Trajectory, leaps: Sequence[Leap]) -> Iterator[str]:
    """Of unusual distances between snapshots that no recorded leap explains."""
    for gap in odd_gaps(trajectory.steps):
        if not any(leap.origin_step < gap.late and gap.early < leap.valid_step for leap in leaps):
            yield (
                f"caution: steps {gap.early} -> {gap.late}, usual distance {gap.usual}: did the run resume from a forecast there?"
                f" No ledger tells of one. If it did, the leap counts as training: use --steps {gap.late}:, or name the ledger"
                " of that leap with --ledger"
            )


def resumed_from(leap: Leap, trajectory: Trajectory, *, landed: int = -1) -> bool:
    """Whether training resumed from a forecast, as the run's snapshots tell.

    A run that has no snapshot from the origin to the forecast's step, where it would have saved some, has jumped there.
    Otherwise the weights decide: after a leap the next snapshot lies nearer to the forecast than to the snapshot before.
    Where the forecast is gone, a run whose counters were kept is taken to have resumed (a shorter history does no harm,
    a leap taken for movement does), and one that has snapshots in between not. A leap shorter than the distance between
    snapshots cannot be told from training, and hardly matters.

    Args:
        landed: where the run resumed from a leap before this one: the move from there to the next snapshot is not all training's.
    """
    before = [snapshot for snapshot in trajectory.snapshots if snapshot.step <= leap.resumes_after]
    after = [snapshot for snapshot in trajectory.snapshots if snapshot.step > leap.resumes_after]
    if not before or not after:
        return bool(after)
    if leap.counters == "advance":
        if leap.valid_step - leap.origin_step < usual_interval(trajectory.steps):
            return False
        if before[-1].step <= leap.origin_step:
            return True
    past = _drift_before(leap, [snapshot for snapshot in trajectory.snapshots if snapshot.step > landed])
    nearer = _nearer_to_forecast(leap, past, before[-1], after[0])
    return leap.counters == "keep" if nearer is None else nearer


def _nearer_to_forecast(leap: Leap, past: Sequence[Snapshot], before: Snapshot, after: Snapshot) -> bool | None:
    """Whether a snapshot lies nearer to the forecast than to the snapshot before it; None where that cannot be read.

    As they are, and once both are carried on to its step by the drift before the leap: a plain run comes near a forecast
    that lay ahead of it. A snapshot before that equals the forecast is the forecast, put into the run's folder.

    Args:
        past: two snapshots that show the drift; the forecast's own step shows it where there are none.
    """
    num_read = len(past) + 3
    try:
        alignment = align((*past, before, open_snapshot(opened(Path(), leap.forecast), after.weights), after))
        gram, _ = accumulate(alignment, range(num_read), num_samples=NUM_COMPARED)
    except FarcastError:
        return None
    moves = np.eye(num_read + 1)[: num_read - 1]  # from each snapshot to the next, over the basis (R,)
    drift = moves[0] / (past[1].step - past[0].step) if past else moves[-2] / max(1, leap.valid_step - leap.origin_step)
    carried = drift * (after.step - leap.resumes_after), drift * (after.step - before.step)
    return not gram.total_norm(moves[-2]) or all(
        gram.total_norm(moves[-1] - share * carried[0]) < gram.total_norm(moves[-2] + moves[-1] - share * carried[1])
        for share in (0, 1)
    )


def _drift_before(leap: Leap, snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Two snapshots that the run's drift before a leap shows between, as far apart as it leapt; none where there is one."""
    seen = [snapshot for snapshot in snapshots if snapshot.step <= leap.origin_step]
    start = leap.origin_step - (leap.valid_step - leap.origin_step)
    early = [snapshot for snapshot in seen if snapshot.step <= start][-1:] or seen[:1]
    return (early[0], seen[-1]) if early and early[0].step < seen[-1].step else ()
