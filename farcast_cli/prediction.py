"""From a fitted forecaster to a published checkpoint: what to forecast, whether to, and from which files.

The order matters: everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.card import upload_command
from farcast_cli.checkpoint.convert import settle
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.errors import FarcastError, SampledError, UsageError, listed, shell_word
from farcast_cli.folder import note_on
from farcast_cli.forecast.backtest import LOSS_JUMP, decide, pace_to
from farcast_cli.forecast.choice import AUTO, choose_method, default_method, propose_horizon
from farcast_cli.forecast.forecaster import Method, Task, forecast
from farcast_cli.forecast.forecaster_file import Fitted, newer_snapshots, realign, reopen
from farcast_cli.forecast.judgement import carrier_of
from farcast_cli.forecast.methods import find_method
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.forecast.words import counted
from farcast_cli.planning import check_ledger_of, claim, place_of, prepare, start_at, state_of
from farcast_cli.publish import publish
from farcast_cli.records import FittedOn
from farcast_cli.repeat import check_unchanged
from farcast_cli.request import Outcome, Prepared, Request, Start
from farcast_cli.run.trajectory import WHOLE
from farcast_cli.state.advance import HISTORY
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.names import find_number_in_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from farcast_cli.choices import Purpose
    from farcast_cli.forecast.backtest import Decision
    from farcast_cli.forecast.judgement import BacktestReport
    from farcast_cli.progress import Progress
    from farcast_cli.trainers.base import Snapshot

FALLING = 0.95  # of the rate before; a mean over the horizon below it is a decay
REPLACED = (0.6, 1.0)  # of the skipped training, by leaps in full length (docs/method.md)
REPLACED_LATE = (-0.1, 0.8)  # the same of later and of longer leaps


def predict(fitted: Fitted, request: Request, progress: Progress) -> list[Outcome]:
    """Forecast every horizon that the run's history supports, in one pass over the files.

    Returns:
        one outcome per horizon; `path` is None where the verdict, or the user's own evaluation, was against it.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: nothing was published.
    """
    judged = judge(fitted, request)
    request, outcomes, chosen = judged.request, list(judged.outcomes), judged.chosen
    if not chosen:  # no file of the run need be there
        return outcomes
    prepared = plan(fitted, judged)
    check_ledger_of(request, fitted.directory)
    supported = [outcomes[i] for i in chosen]
    written = publish(prepared, supported, request, run=fitted.directory, on=_fitted_on(fitted), progress=progress)
    for i, outcome in zip(chosen, written, strict=True):
        outcomes[i] = outcome
    return outcomes


def _steps_to(step: int, origin: int, purpose: Purpose) -> int:
    """The horizon that ends at a step.

    Raises:
        UsageError: a step that is not after the origin; to evaluate, the origin itself will do.
    """
    if step < origin + (purpose == "resume"):
        which = f"after {origin}, the origin" if purpose == "resume" else f"of {origin}, the origin, or later"
        raise UsageError(f"--to-step {step}: expected a step {which}")
    return step - origin


# --- the decision ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """What the run's history says of a request, before any tensor is read."""

    request: Request
    """With its horizons."""
    index: int
    """Of the origin in the history."""
    start: Start | None
    """Where it had to be opened."""
    method: Method
    tasks: tuple[Task, ...]
    outcomes: tuple[Outcome, ...]
    """One per horizon, with nothing written."""

    @property
    def chosen(self) -> list[int]:
        """The horizons that are written, by their index."""
        forced = self.request.even_if_worse
        return [i for i, o in enumerate(self.outcomes) if forced or o.decision.verdict == "forecast"]


def judge(fitted: Fitted, request: Request) -> Judged:
    """Settle the horizons and the method, and judge each horizon by the run's own history."""
    index = _index_of(fitted, request)
    if request.to_step is not None:
        request = replace(request, horizons=(_steps_to(request.to_step, fitted.steps[index], request.purpose),))
    start = _open(fitted, index, request) if _ends_with_the_run(request) else None
    method, request, notes = _settle(fitted, request, index, start)
    tasks = tuple(_task(fitted, request, index, horizon) for horizon in request.horizons)
    decisions = [_decide(method, _judged(fitted, task), request, start) for task in tasks]
    outcomes = (
        Outcome(
            int(task.horizon),
            fitted.steps[index],
            method.name,
            decision,
            task.pace,
            task.pace_ahead,
            task.length_factor,
            notes,
            fitted.rule,
        )
        for task, decision in zip(tasks, decisions, strict=True)
    )
    return Judged(request, index, start, method, tasks, tuple(outcomes))


def proposed(fitted: Fitted, request: Request) -> tuple[Judged, str]:
    """What `predict` would do; if the run's files are gone, its end is not known, and the second value says why."""
    try:
        return judge(fitted, request), ""
    except FarcastError as error:
        return judge(fitted, replace(request, counters="keep")), str(error)


def within_run(report: BacktestReport, fitted: Fitted) -> BacktestReport:
    """A back-test to resume from whose verdicts know the end of the run, as `predict` does; unchanged if the files do not tell.

    Raises:
        FileFormatError: a file that is there cannot be read.
    """
    try:
        start = _open(fitted, len(fitted.steps) - 1, Request())
    except FarcastError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return report  # the files are gone or have changed, and the forecaster file tells what they were
    decisions = {
        horizon: (method, _within(decision, start, horizon)) for horizon, (method, decision) in report.decisions.items()
    }
    return replace(report, decisions=decisions)


def _within(decision: Decision, start: Start, horizon: int) -> Decision:
    if not start.ends_before(horizon) or decision.verdict != "forecast":
        return decision
    return replace(decision, verdict="abstain", reason=start.limit, is_over=True)


def origin_of(fitted: Fitted, request: Request) -> Start:
    """Where the forecasts of a request begin.

    Raises:
        SnapshotError, FileFormatError: the snapshot is gone, has changed, or cannot be read.
    """
    return _open(fitted, _index_of(fitted, request), request)


def _index_of(fitted: Fitted, request: Request) -> int:
    """Of the origin in the history."""
    return len(fitted.steps) - 1 if request.origin_step is None else fitted.index_of(request.origin_step)


def _open(fitted: Fitted, index: int, request: Request) -> Start:
    return start_at(fitted.directory, reopen(fitted, index), index, request)


def _ends_with_the_run(request: Request) -> bool:
    """Whether a horizon is proposed, and the trainer's state limits it."""
    return not request.horizons and request.purpose == "resume" and request.counters == "advance"


def _settle(fitted: Fitted, request: Request, index: int, start: Start | None) -> tuple[Method, Request, tuple[str, ...]]:
    """The method, the request with its horizons, and what was chosen for the user in words.

    Args:
        start: where a proposal must end with the run, and on an epoch's end where it can.
    """
    notes = []
    default = default_method(request.purpose, horizon=request.horizons[0] if request.horizons else None)
    first = _judged(fitted, _task(fitted, request, index, request.horizons[0] if request.horizons else 1))
    leap = fitted.provenance.leap
    if not request.horizons:
        known = find_method(request.method) if request.method not in {None, AUTO} else default
        left = start.steps_left if start else None
        horizon = propose_horizon(known, first, request.purpose, after_leap=leap is not None, steps_left=left)
        horizon = _whole_epochs(start.origin, horizon) if start else horizon
        first, request = replace(first, horizon=float(horizon)), replace(request, horizons=(horizon,))
        since = f" since the leap to step {leap.resumes_after}" if leap else ""
        share = f"{first.lead:.0%} of the history of {counted(round(first.timeline.length), fitted.rule.unit)}{since}"
        notes.append(f"horizon {horizon}: {share if horizon else 'the run at the origin, without its noise'}")
    method, why = choose_method(request.method or default.name, first, request.purpose)
    if why:
        notes.append(f"method {method.name}: {why}")
    return method, request, tuple(notes)


def _whole_epochs(origin: Snapshot, horizon: int) -> int:
    """The longest horizon, no longer than this one, at which an epoch ends; unchanged where that is less than half."""
    clock = trainer_of(origin).clock([(origin.step, state_of(origin))], origin.step + horizon)
    ends = [end for end in clock.epoch_ends if end <= horizon] if clock else []
    return ends[-1] if ends and 2 * ends[-1] >= horizon else horizon


def _judged(fitted: Fitted, task: Task) -> Task:
    gram, sample = fitted.judged()
    return replace(task, gram=gram, sample=sample)


def _task(fitted: Fitted, request: Request, index: int, horizon: int) -> Task:
    if index == 0:
        raise UsageError(f"--origin {request.origin_step}: the first snapshot has no history")
    if not (math.isfinite(request.options.scale) and request.options.scale > 0):
        raise UsageError(f"--scale {request.options.scale}: expected a positive number")
    if horizon < (request.purpose == "resume"):
        raise UsageError(f"horizon {horizon}: expected a step after the origin, {fitted.steps[index]}")
    timeline = Timeline(fitted.gram.steps, float(fitted.steps[index]))
    pace = pace_to(fitted.provenance.pace, timeline, horizon, wanted=request.clock)
    anneals = request.purpose == "resume" and request.clock is None
    device = request.resources.device
    return Task(fitted.gram, fitted.sample, timeline, float(horizon), request.options, device, pace, anneals)


def _decide(method: Method, task: Task, request: Request, start: Start | None) -> Decision:
    decision = decide(method, task, request.purpose)
    if start is None or not start.ends_before(1):
        return decision
    return replace(decision, verdict="abstain", reason=start.limit, is_over=True)


# --- planning --------------------------------------------------------------------------------------------------------


def plan(fitted: Fitted, judged: Judged) -> Prepared:
    """Plan the horizons that are written; reads headers only.

    Raises:
        UsageError, SnapshotError, FileFormatError, OutputError: they cannot be written.
    """
    request = judged.request
    start = judged.start or _open(fitted, judged.index, request)
    steps = [forecast(judged.method, judged.tasks[i]) for i in judged.chosen]
    linear = LinearMap.from_updates(steps, judged.index)
    return _prepare(fitted, request, start, [request.horizons[i] for i in judged.chosen], linear)


def _prepare(fitted: Fitted, request: Request, start: Start, horizons: Sequence[int], linear: LinearMap) -> Prepared:
    opened = {index: start.origin if index == start.index else reopen(fitted, index) for index in linear.used}
    _refuse_samples([opened[index] for index in linear.used] + [start.origin])
    container = settle(start.origin, request.layout, inner=request.place)
    run, unit = fitted.directory, _name_unit(fitted)
    paths = [place_of(request, start, horizon, container, unit=unit) for horizon in horizons]
    is_file = container.is_one_file
    same = None if request.overwrite else partial(check_unchanged, is_file=is_file, run=run)  # publish compares how it was made
    claim(paths, run, request, is_file=is_file, existing=same)
    used = [opened[index] for index in linear.used]
    inputs = Inputs(realign(fitted, used), linear.restrict(linear.used))
    history = _history(fitted, opened, start.index)
    return prepare(request, start, history, inputs, horizons, container=container, paths=paths, snapshots=used)


def _refuse_samples(snapshots: Sequence[Snapshot]) -> None:
    """Refuse snapshots of which only a sample was kept.

    Raises:
        SampledError: some are such.
    """
    found = [snapshot.path for snapshot in snapshots if snapshot.is_sample]
    if found:
        raise SampledError(
            f"{found[0].parent}: this forecast needs all weights, and only a sample was kept in"
            f" {listed(dict.fromkeys(path.name for path in found))}",
            hint=f"choose a --method that reads fewer snapshots (farcast backtest -v lists them); {WHOLE}",
        )


def _history(fitted: Fitted, opened: Mapping[int, Snapshot], last: int) -> list[Snapshot]:
    """The last few snapshots up to the origin; older ones that have been rotated away are not needed."""
    found = []
    for index in range(max(0, last - HISTORY + 1), last + 1):
        if index in opened:
            found.append(opened[index])
        elif fitted.path_of(fitted.provenance.snapshots[index]).exists():
            found.append(reopen(fitted, index))
    return found


def _name_unit(fitted: Fitted) -> Fraction:
    """What the numbers in the snapshots' names count per step: 1, or less where a name is a save index."""
    found = [
        (record.step, find_number_in_name(Path(record.path).name, fitted.provenance.unit))
        for record in fitted.provenance.snapshots
    ]
    numbers = [(step, int(match[1])) for step, match in found if match]
    if len(numbers) < 2 or numbers[0][0] == numbers[-1][0]:  # noqa: PLR2004 - a rate takes two
        return Fraction(1)
    (first, low), (last, high) = numbers[0], numbers[-1]
    return Fraction(high - low, last - first)


def _fitted_on(fitted: Fitted) -> FittedOn:
    """What a forecast's sidecar says of the fit."""
    return FittedOn(
        snapshots=len(fitted.steps),
        first_step=fitted.steps[0],
        last_step=fitted.steps[-1],
        samples_per_tensor=fitted.provenance.num_samples,
    )


# --- what to know of it ----------------------------------------------------------------------------------------------


def default_notes(fitted: Fitted, request: Request, outcomes: Sequence[Outcome]) -> list[str]:
    """What a person should know before using the forecasts."""
    notes = []
    newer = newer_snapshots(fitted)
    if newer and request.origin_step is None:
        again = f"farcast fit {fitted.selected}"
        notes.append(f"the run has newer snapshots than the forecaster, up to {newer[-1]}: {again}")
    if request.purpose == "resume" and (carrier := carrier_of(fitted)):
        notes.append(carrier)
    written = [outcome for outcome in outcomes if outcome.path]
    folders = {outcome.path.parent for outcome in outcomes if outcome.path and request.output is None}
    notes += [odd for folder in folders if (odd := note_on(folder, fitted.directory))]
    if request.purpose == "evaluation":
        notes += (
            [f"{', '.join(str(one.path) for one in written)}: evaluate or ship it; do not resume from it"] if written else []
        )
        if request.layout == "hub" and not request.dry_run:
            notes += [f"nothing is uploaded; to upload it: {upload_command(str(one.path))}" for one in written]
        if any(outcome.horizon == 0 for outcome in written) and proposed(fitted, Request())[0].chosen:
            notes.append(
                "the run keeps its direction, so weights ahead may score better: farcast predict --for evaluation --horizon N"
                " --eval-cmd CMD tells"
            )
        if written and fitted.has_batch_norm:
            notes.append(
                "BatchNorm's statistics were forecast like weights; torch.optim.swa_utils.update_bn, or a pass"
                " over training data in training mode, makes them exact"
            )
        return notes
    moving = [outcome for outcome in written if outcome.method != "persistence"]
    rising = [f"{outcome.decision.ratio:.2f}" for outcome in moving if outcome.decision.ratio > LOSS_JUMP]
    if rising:
        notes.append(f"b = {', '.join(rising)}: the loss will probably rise at first; judge it some hundred steps later")
    if request.counters == "advance":
        notes += _share_notes([outcome for outcome in moving if outcome.pace_ahead < FALLING], request)
    return notes


def _share_notes(outcomes: Sequence[Outcome], request: Request) -> Iterator[str]:
    """Under a falling rate, how much of the training that it skips such a leap replaced, and the control that tells of this run."""
    for is_full in (True, False):
        alike = [outcome for outcome in outcomes if (outcome.length_factor == 1) == is_full]
        if not alike:
            continue
        low, high = REPLACED if is_full else REPLACED_LATE
        which = "like this" if is_full else "that ended as late or were as long"
        control = Path("control") / Path(str(alike[0].path)).name
        place = shell_word(control) if len(alike) == 1 else f"control{os.sep}"
        horizons = ",".join(str(outcome.horizon) for outcome in alike)
        yield (
            f"the learning rate falls: on small runs, leaps {which} replaced {low} to {high} of the skipped training, measured by the"
            " final loss; compare your forecast with the control:"
            f" farcast predict{request.source} --horizon {horizons}{request.origin_option} --method persistence -o {place}"
        )
