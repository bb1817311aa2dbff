"""Learning from a run: which of its snapshots, by one pass over a sample of its tensors, and whether they are those of one run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli.agreement import agreed
from farcast_cli.choices import DEFAULT_SAMPLE
from farcast_cli.engine import native
from farcast_cli.engine.ranks import Team
from farcast_cli.engine.reader import Resources
from farcast_cli.errors import MixedRunsError, UsageError
from farcast_cli.files.staged import staging
from farcast_cli.forecast.accumulate import accumulate, bytes_to_sample, hand_in
from farcast_cli.forecast.backtest import MAX_HORIZON
from farcast_cli.forecast.forecaster_file import (
    CopiedRecord,
    Fitted,
    Provenance,
    SnapshotRecord,
    TensorRecord,
    check_fitted_place,
    load_fitted,
    refuse_to_replace,
    run_of_fitted,
    write_fitted,
)
from farcast_cli.forecast.history import past_of
from farcast_cli.forecast.judgement import carrier_of
from farcast_cli.run.alignment import align
from farcast_cli.run.kept import discover_all
from farcast_cli.run.losses import losses_of
from farcast_cli.run.selection import usable
from farcast_cli.run.thinning import thinned
from farcast_cli.run.trajectory import MIN_SNAPSHOTS, WHOLE
from farcast_cli.state.rates import read_pace
from farcast_cli.state.trained import trained_in
from farcast_cli.trainers.base import unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.forecast.backtest import Steadiness
    from farcast_cli.forecast.gram import Gram
    from farcast_cli.forecast.history import Past
    from farcast_cli.forecast.ledger import Leap
    from farcast_cli.forecast.state_ledger import Ledgers
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.progress import Progress
    from farcast_cli.run.alignment import Alignment
    from farcast_cli.run.losses import LossLog
    from farcast_cli.run.selection import Selection, Usable
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot

_WRITTEN = "written"


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What the user asks to be fitted, by `fit` or by a back-test of a folder."""

    selection: Selection
    num_samples: int | None = DEFAULT_SAMPLE
    """Of each tensor; None reads all values."""
    ledgers: Ledgers | None = None
    """The leaps that the run may have resumed from; they are looked up unless the user chose the steps."""
    resources: Resources = field(default_factory=Resources)
    output: Path | None = None
    """The forecaster file to write."""
    team: Team = field(default_factory=Team)
    """The processes that do this together; they meet where the forecaster file is written."""
    losses: Path | None = None
    """The run's log of losses, if it is not where it is looked for."""


@dataclass(frozen=True, slots=True)
class FitPlan:
    """Which snapshots are fitted, of all that were found, and what a person should know of that."""

    request: FitRequest
    found: Trajectory
    past: Past
    """The run since the last leap that it resumed from."""
    usable: Usable
    started: float
    """When, by the monotonic clock."""
    replaced: Path | None = None
    """The folder of another run, whose forecaster file is replaced."""
    losses: LossLog | None = None
    """What the run logged of its losses."""

    @property
    def unread(self) -> str:
        """Why a log of losses could not be read; empty where it could."""
        return (
            f"note: the run's losses are not known: {self.losses.unread}"
            if self.losses is not None and self.losses.unread
            else ""
        )

    @property
    def worth(self) -> Worth | None:
        """What the losses say of the last leap that the run resumed from."""
        return self.past.worth(self.losses)


@dataclass(frozen=True, slots=True)
class FitOutcome:
    """What was learned, and what it took."""

    fitted: Fitted
    steady: Steadiness
    bytes_read: int
    seconds: float
    cautions: tuple[str, ...] = ()
    """Of leaps that the history may contain, by the steps of its snapshots and by the ledgers."""
    jumps: tuple[str, ...] = ()
    """The same, by the weights."""
    carrier: str = ""
    """A tensor without which the verdict would be another, in words."""
    worth: Worth | None = None
    """What the run's losses say of its last leap."""
    unlogged: tuple[str, ...] = ()
    """Where the numbers could not be logged, and why."""


def plan_fit(request: FitRequest) -> FitPlan:
    """Choose the snapshots to learn from; reads headers, and of leaps a few values.

    Raises:
        SnapshotError, FileFormatError: no run that can be learned from.
        OutputError: the output would lie in the run's folder.
    """
    started, chosen, replaced = time.monotonic(), request.selection, None
    if request.output is not None:
        check_fitted_place(request.output, chosen.directory, clears=request.team.leads)
        before = run_of_fitted(request.output)
        replaced = before if before and before.resolve() != chosen.directory.resolve() else None
    found, past = find(request, minimum=MIN_SNAPSHOTS)
    return replace(plan_found(request, found, past), started=started, replaced=replaced)


def find(request: FitRequest, *, minimum: int) -> tuple[Trajectory, Past]:
    """The snapshots of a run, and those since the last leap; reads headers, and of leaps a few values.

    Raises:
        TooFewSnapshotsError: fewer than `minimum`.
        SnapshotError, FileFormatError: no run that can be read.
    """
    chosen = request.selection
    found = discover_all(chosen.directory, **chosen.entries, history=chosen.history, minimum=minimum)
    return found, past_of(found, request.ledgers, chosen=chosen.steps, minimum=minimum)


def plan_found(request: FitRequest, found: Trajectory, past: Past) -> FitPlan:
    """The plan for what `find` found."""
    entering = usable(past.history.trajectory.snapshots, request.selection)
    _check_samples(entering.snapshots, request.num_samples)
    return FitPlan(request, found, past, entering, time.monotonic(), losses=losses_of(found, request.losses))


def _check_samples(snapshots: Sequence[Snapshot], num_samples: int | None) -> None:
    """Refuse to read other values than those that kept samples hold.

    Raises:
        UsageError: some snapshots are samples, and --sample or --full asks for other values.
    """
    sample = next((snapshot for snapshot in snapshots if snapshot.is_sample), None)
    if sample is not None and num_samples != DEFAULT_SAMPLE:
        asked = "--full" if num_samples is None else f"--sample {num_samples}"
        raise UsageError(
            f"{asked}: {sample.path} holds a sample of {DEFAULT_SAMPLE} values of each tensor, and no others",
            hint=f"leave it out; {WHOLE}",
        )


def fit_planned(plan: FitPlan, progress: Progress) -> FitOutcome:
    """Learn from the snapshots that were chosen, and write the forecaster file where one is asked for."""
    request, usable = plan.request, plan.usable
    trajectory = replace(plan.past.history.trajectory, snapshots=usable.snapshots, notes=(*plan.found.notes, *usable.notes))
    bytes_done = []
    tell = progress("fit", bytes_to_sample(trajectory.snapshots, request.num_samples))

    def count(num_bytes: int) -> None:
        bytes_done.append(num_bytes)
        tell(num_bytes)

    entering = _Entering.of(trajectory, include=request.selection.include, exclude=request.selection.exclude)
    if request.team.leads:
        fitted = _learn(entering, request, plan.past.history.leap, count)
    else:
        fitted = _help(entering, request, plan.past.history.leap)
    seconds = time.monotonic() - plan.started
    jumps = tuple(_cautions_of_jumps(fitted))
    return FitOutcome(
        fitted, fitted.steadiness(), sum(bytes_done), seconds, plan.past.cautions, jumps, carrier_of(fitted), plan.worth
    )


@dataclass(frozen=True, slots=True)
class _Entering:
    """What is read: snapshots of a run, and their tensors side by side."""

    trajectory: Trajectory
    alignment: Alignment
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @classmethod
    def of(cls, trajectory: Trajectory, *, include: Sequence[str], exclude: Sequence[str]) -> _Entering:
        """Of a run with very many snapshots some enter (`thinning`): the notes say which."""
        snapshots, note = thinned(trajectory.snapshots, include=include, exclude=exclude)
        entering = replace(trajectory, snapshots=snapshots, notes=(*trajectory.notes, *([note] if note else [])))
        return cls(entering, align(snapshots, include=include, exclude=exclude), tuple(include), tuple(exclude))


def fit(
    trajectory: Trajectory,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    leap: Leap | None = None,
    num_samples: int | None,
    resources: Resources | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Learn from a run: one pass over a sample of its tensors (all of them where `num_samples` is None).

    Peak memory: the inner products, 64 MiB or little more; the sample; and an entry for each tensor of each snapshot that
    enters.
    """
    entering = _Entering.of(trajectory, include=include, exclude=exclude)
    return _learned(entering, num_samples, resources or Resources(), Team(), leap=leap, progress=progress)


def _learned(
    entering: _Entering,
    num_samples: int | None,
    resources: Resources,
    team: Team,
    *,
    leap: Leap | None,
    progress: Callable[[int], None],
) -> Fitted:
    """What was learned, on rank 0."""
    trajectory, alignment = entering.trajectory, entering.alignment
    with unchanged(trajectory.snapshots):
        gram, sample = accumulate(
            alignment, trajectory.steps, num_samples=num_samples, resources=resources, team=team, progress=progress
        )
        pace = read_pace(trajectory.snapshots, ahead=math.ceil(MAX_HORIZON * (trajectory.steps[-1] - trajectory.steps[0])))
        records = tuple(_record(snapshot, trajectory) for snapshot in trajectory.snapshots)
    trained = trained_in(trajectory.snapshots[-1])
    last = [(tensor.entries[-1], tensor.remark) for tensor in alignment.tensors]
    provenance = Provenance(
        directory=str(trajectory.directory),
        layout=trajectory.layout,
        snapshots=records,
        tensors=tuple(
            TensorRecord(name=e.name, shape=e.shape, dtype=e.dtype.name, remark=remark, trained=trained.get(e.name))
            for e, remark in last
        ),
        copied=tuple(CopiedRecord(name=c.name, reason=c.reason, of=c.of) for c in alignment.copied),
        num_samples=num_samples,
        leap=leap,
        pace=pace,
        notes=trajectory.notes,
        include=entering.include,
        exclude=entering.exclude,
        pattern=trajectory.pattern,
        step_from=trajectory.rule.source,
        unit=trajectory.rule.unit,
        weights=trajectory.weights,
        steps="" if trajectory.chosen is None else str(trajectory.chosen),
        kept="" if trajectory.kept is None else str(trajectory.kept),
    )
    fitted = Fitted(gram, sample, provenance, trajectory.directory, trajectory.kept)
    _check_one_run(fitted.judged()[0], trajectory)
    return fitted


def _learn(entering: _Entering, request: FitRequest, leap: Leap | None, progress: Callable[[int], None]) -> Fitted:
    """Learn, with the help of the other ranks, and write the forecaster file where one is asked for."""
    team, output = request.team, request.output

    def learned() -> Fitted:
        return _learned(entering, request.num_samples, request.resources, team, leap=leap, progress=progress)

    if output is None:
        return learned()
    with staging() as outputs:
        outputs.tell_end(team.close)
        place = outputs.add(output, check=refuse_to_replace)
        team.open([place], _agreed(entering, request, leap))
        fitted = learned()
        write_fitted(fitted, place, home=output.parent)
        team.begin(_WRITTEN)
        team.wait()
    return fitted


def _help(entering: _Entering, request: FitRequest, leap: Leap | None) -> Fitted:
    """Do this rank's share of what rank 0 learns; returns what that is."""
    team, output = request.team, request.output
    assert output is not None  # noqa: S101 - ranks meet there
    with team.joined([output], _agreed(entering, request, leap)) as (place,):
        with unchanged(entering.trajectory.snapshots):
            hand_in(entering.alignment, num_samples=request.num_samples, resources=request.resources, team=team)
        team.begin(_WRITTEN)
        return load_fitted(place, home=output.parent)


def _agreed(entering: _Entering, request: FitRequest, leap: Leap | None) -> dict[str, str]:
    """What all ranks must have planned alike."""
    leapt = None if leap is None else (leap.origin_step, leap.valid_step)
    plan = [repr((entering.trajectory.steps, request.num_samples, request.resources.device, leapt))]
    plan += [tensor.name for tensor in entering.alignment.tensors]
    return agreed(entering.trajectory.snapshots, plan, engine=native.engine())


def _record(snapshot: Snapshot, trajectory: Trajectory) -> SnapshotRecord:
    is_kept = trajectory.kept is not None and snapshot.path.parent == trajectory.kept
    home = trajectory.kept if is_kept and trajectory.kept else trajectory.directory
    return SnapshotRecord(
        path=snapshot.path.relative_to(home).as_posix(),
        is_kept=is_kept,
        step=snapshot.step,
        step_source=snapshot.step_source,
        bytes=snapshot.num_bytes,
        digest=snapshot.digest,
    )


SUSPICIOUS = 2.0  # times the larger of its neighbours: a leap of a stretch between two snapshots doubles the move
JUMP = 8.0  # times the larger of its neighbours: no optimiser moves like this, another run's weights do
MIN_MOVES = 4  # a jump needs neighbours on both sides
FLIP = -0.75  # cosine of neighbouring moves; two runs interleaved give -1, pure noise around a point -0.5


def _check_one_run(gram: Gram, trajectory: Trajectory) -> None:
    """Two runs of one model have equal names and shapes; only the path of the weights tells them apart.

    Interleaved, every move undoes the one before; one behind the other, a single move dwarfs its neighbours.
    """
    moves = gram.moves
    sizes = _sizes(moves)
    if len(sizes) < MIN_MOVES or not sizes.all():
        return
    cosines = np.diag(moves, 1) / (sizes[1:] * sizes[:-1])
    names = [snapshot.path.name for snapshot in trajectory.snapshots]
    hint = "a trajectory is one run: move the other run to its own folder, or choose steps with --steps FROM:TO"
    if np.median(cosines) < FLIP:
        raise MixedRunsError(
            f"{trajectory.directory}: two runs probably alternate: from {names[0]} to {names[1]}"
            f" to {names[2]} the weights go back and forth (cosine {cosines[0]:.2f})",
            hint=hint,
        )
    for index, times in _jumps(sizes, trajectory.steps, above=JUMP):
        raise MixedRunsError(
            f"{trajectory.directory}: two runs probably meet between {names[index]} and {names[index + 1]}: the weights"
            f" move {times:.0f} times as fast as before and after",
            hint=hint,
        )


def _sizes(moves: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.maximum(np.diag(moves), 0))


def _jumps(sizes: NDArray[np.float64], steps: Sequence[int], *, above: float) -> Iterator[tuple[int, float]]:
    """The moves that are so many times as fast as both their neighbours, and how many times that is.

    Noise grows with the root of the steps, drift with the steps: a jump is one by both.
    """
    spans = np.diff(steps)
    rates, speeds = sizes / np.sqrt(spans), sizes / spans
    for index in range(1, len(sizes) - 1):
        neighbours = [index - 1, index + 1]
        if rates[index] > above * rates[neighbours].max() and speeds[index] > above * speeds[neighbours].max():
            yield index, float(rates[index] / rates[neighbours].max())


def _cautions_of_jumps(fitted: Fitted) -> Iterator[str]:
    """Of single moves that a leap may have made: the run's own are about as long as their neighbours."""
    sizes, steps = _sizes(fitted.judged()[0].moves), fitted.steps
    if len(sizes) < MIN_MOVES or not sizes.all():
        return
    for index, times in _jumps(sizes, steps, above=SUSPICIOUS):
        yield (
            f"caution: steps {steps[index]} -> {steps[index + 1]}: the weights move {times:.1f} times as fast as before and after:"
            " did the run resume from a forecast there? If it did, the leap counts as training: use --steps"
            f" {steps[index + 1]}:, or name the ledger of that leap with --ledger"
        )
