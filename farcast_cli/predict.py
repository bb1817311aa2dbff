"""From a fitted forecaster to a published checkpoint: decide, plan, write in one pass, advance the trainer, rename.

The order matters: everything that can be refused is refused before the first byte is written.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.checkpoint.convert import settle
from farcast_cli.engine.batch import Inputs
from farcast_cli.engine.linear import LinearMap
from farcast_cli.engine.write import Engine
from farcast_cli.errors import UsageError, shell_word
from farcast_cli.evaluation.judge import logs_of
from farcast_cli.files.hidden import clear_left
from farcast_cli.files.place import check_outside, sidecar_of
from farcast_cli.forecast.backtest import LOSS_JUMP, decide
from farcast_cli.forecast.choice import AUTO, choose_method, default_method, propose_horizon
from farcast_cli.forecast.forecaster import Method, Task, forecast
from farcast_cli.forecast.forecaster_file import Fitted, newer_snapshots, realign, reopen
from farcast_cli.forecast.ledger import check_ledger
from farcast_cli.forecast.methods import find_method
from farcast_cli.forecast.timeline import Timeline
from farcast_cli.planning import check_place, place_of, plan_forecast, state_of
from farcast_cli.publish import Progress, publish
from farcast_cli.request import Outcome, Prepared, Request
from farcast_cli.state.advance import HISTORY
from farcast_cli.trainers import trainer_of
from farcast_cli.trainers.base import find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

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
    if request.to_step is not None:
        request = replace(request, horizons=(request.to_step - fitted.steps[_origin_index(fitted, request)],))
    steps_left = _steps_left(fitted, request)
    method, request, notes = _settle(fitted, request, steps_left)
    tasks = [_task(fitted, request, horizon) for horizon in request.horizons]
    decisions = [decide(method, _judged(fitted, task), request.purpose) for task in tasks]
    origin_step = int(tasks[0].timeline.origin)
    if steps_left is not None and steps_left <= 1:
        reason = f"the run ends at step {origin_step + steps_left}, and a leap needs training after it"
        decisions = [replace(decision, verdict="abstain", reason=reason) for decision in decisions]
    outcomes = [
        Outcome(int(task.horizon), origin_step, method.name, decision, task.pace, task.pace_ahead, task.length_factor, notes)
        for task, decision in zip(tasks, decisions, strict=True)
    ]
    chosen = [i for i, d in enumerate(decisions) if d.verdict == "forecast" or request.even_if_worse]
    if not chosen:
        return outcomes
    steps = [forecast(method, tasks[i]) for i in chosen]
    prepared = _prepare(fitted, request, [request.horizons[i] for i in chosen], steps)
    if request.ledger is not None and request.purpose == "resume" and not request.dry_run:
        check_outside(request.ledger, fitted.directory, option="--ledger")
        check_ledger(request.ledger, fitted.directory)
    written = publish(prepared, [outcomes[i] for i in chosen], request, fitted, progress)
    for index, outcome in zip(chosen, written, strict=True):
        outcomes[index] = outcome
    return outcomes


def _settle(fitted: Fitted, request: Request, steps_left: int | None) -> tuple[Method, Request, tuple[str, ...]]:
    """The method, the request with its horizons, and what was chosen for the user in words."""
    notes = []
    default = default_method(request.purpose, horizon=request.horizons[0] if request.horizons else None)
    first = _judged(fitted, _task(fitted, request, request.horizons[0] if request.horizons else 1))
    after_leap = fitted.provenance.leap is not None
    if not request.horizons:
        known = find_method(request.method) if request.method not in {None, AUTO} else default
        horizon = propose_horizon(known, first, request.purpose, after_leap=after_leap, steps_left=steps_left)
        if request.purpose == "resume" and request.counters == "advance":
            horizon = _whole_epochs(reopen(fitted, _origin_index(fitted, request)), horizon)
        first, request = replace(first, horizon=float(horizon)), replace(request, horizons=(horizon,))
        since = f" since the leap to step {fitted.provenance.leap.resumes_after}" if fitted.provenance.leap else ""
        share = f"{first.lead:.0%} of the history of {first.timeline.length:.0f} steps{since}"
        notes.append(f"horizon {horizon}: {share if horizon else 'the run as it is at the origin'}")
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


def default_notes(fitted: Fitted, request: Request, outcomes: Sequence[Outcome]) -> list[str]:
    """What a person should know before using the forecasts."""
    notes = []
    newer = newer_snapshots(fitted)
    if newer and request.origin_step is None:
        again = f"farcast fit {shell_word(fitted.directory)}"
        notes.append(f"the run has newer snapshots than the forecaster, up to {newer[-1]}: {again}")
    for outcome in outcomes:
        if (
            outcome.path
            and request.purpose == "resume"
            and outcome.method != "persistence"
            and outcome.decision.ratio > LOSS_JUMP
        ):
            notes.append(
                f"b = {outcome.decision.ratio:.2f}: expect the loss to jump at first; judge it some hundred steps later"
            )
        if outcome.path and request.purpose == "resume" and request.counters == "advance":
            notes.extend(_share_note(outcome, request))
        if outcome.path and request.purpose == "evaluation":
            notes.append(f"{outcome.path}: to evaluate or ship; do not resume from it")
            if fitted.has_batch_norm:
                notes.append(
                    "BatchNorm's statistics were carried over with the weights; torch.optim.swa_utils.update_bn, or a pass"
                    " over training data in training mode, makes them exact"
                )
    return list(dict.fromkeys(notes))


def _share_note(outcome: Outcome, request: Request) -> Iterator[str]:
    """Under a falling rate, how much of the training that it skips such a leap replaced, and the control that tells of this run."""
    if outcome.method == "persistence" or outcome.pace_ahead >= FALLING or outcome.path is None:
        return
    origin = "" if request.origin_step is None else f" --origin {request.origin_step}"
    control = shell_word(Path("control") / outcome.path.name)
    low, high = REPLACED if outcome.length_factor == 1 else REPLACED_LATE
    which = "like this" if outcome.length_factor == 1 else "that ended as late, or were as long,"
    yield (
        f"the learning rate falls: on small runs leaps {which} replaced {low} to {high} of the training that they skipped, by the loss"
        " at the end of the schedule; the control tells how much yours does:"
        f" farcast predict --horizon {outcome.horizon}{origin} --method persistence -o {control}"
    )


def _origin_index(fitted: Fitted, request: Request) -> int:
    return len(fitted.steps) - 1 if request.origin_step is None else fitted.index_of(request.origin_step)


def _task(fitted: Fitted, request: Request, horizon: int) -> Task:
    steps, last = fitted.gram.steps, _origin_index(fitted, request)
    if last == 0:
        raise UsageError(f"--origin {request.origin_step}: the first snapshot has no history")
    if not (math.isfinite(request.options.scale) and request.options.scale > 0):
        raise UsageError(f"--scale {request.options.scale}: expected a positive number")
    if horizon < (request.purpose == "resume"):
        raise UsageError(f"horizon {horizon}: expected a step after the origin, {int(steps[last])}")
    timeline = Timeline(steps, float(steps[last]))
    pace = fitted.provenance.pace.clocked(request.clock, timeline.first, timeline.origin + horizon)
    anneals = request.purpose == "resume" and request.clock is None
    return Task(fitted.gram, fitted.sample, timeline, float(horizon), request.options, request.resources.device, pace, anneals)


# --- planning --------------------------------------------------------------------------------------------------------


def _prepare(fitted: Fitted, request: Request, horizons: Sequence[int], steps: Sequence[NDArray[np.float64]]) -> Prepared:
    last = _origin_index(fitted, request)
    linear = LinearMap.from_steps(steps, last)
    snapshots = {index: reopen(fitted, index) for index in linear.used}
    origin = snapshots[last]
    history = _history(fitted, snapshots, last)
    target = settle(origin, request.layout)
    places = [place_of(request, origin, horizon, _name_unit(fitted), target) for horizon in horizons]
    if not request.dry_run:
        for place in places:
            clear_left(place)
            clear_left(sidecar_of(place, is_file=True))
    for place in places:
        check_place(place, fitted.directory, overwrite=request.overwrite, is_file=target.is_file)
        if request.evaluator:
            check_outside(logs_of(place), fitted.directory)
    alignment = realign(fitted, [snapshots[index] for index in linear.used])
    index_of = {tensor.name: index for index, tensor in enumerate(alignment.tensors)}
    advanced, plans = [], []
    for horizon in horizons:
        moved, plan = plan_forecast(history, horizon, request, index_of, target)
        advanced.append(moved)
        plans.append(plan)
    engine = Engine(Inputs(alignment, linear.restrict(linear.used)), request.resources)
    used = tuple(snapshots[index] for index in linear.used)
    return Prepared(engine, tuple(plans), tuple(advanced), target, tuple(places), used, origin)


def _history(fitted: Fitted, opened: dict[int, Snapshot], last: int) -> list[Snapshot]:
    """The last few snapshots up to the origin; older ones that have been rotated away are not needed."""
    found = []
    for index in range(max(0, last - HISTORY + 1), last + 1):
        if index in opened:
            found.append(opened[index])
        elif (fitted.directory / fitted.provenance.snapshots[index].path).exists():
            found.append(reopen(fitted, index))
    return found


def _name_unit(fitted: Fitted) -> Fraction:
    """What the numbers in the snapshots' names count per step: 1, or less where a name is a save index."""
    found = [(record.step, find_step_in_name(Path(record.path).name)) for record in fitted.provenance.snapshots]
    numbers = [(step, int(match[1])) for step, match in found if match]
    if len(numbers) < 2 or numbers[0][0] == numbers[-1][0]:  # noqa: PLR2004 - a rate takes two
        return Fraction(1)
    (first, low), (last, high) = numbers[0], numbers[-1]
    return Fraction(high - low, last - first)


def _steps_left(fitted: Fitted, request: Request) -> int | None:
    """How many steps the run still has before it, where its trainer's state tells and a proposal needs to know."""
    if request.horizons or request.purpose != "resume" or request.counters != "advance":
        return None
    origin = reopen(fitted, _origin_index(fitted, request))
    end = trainer_of(origin).end(origin)
    return None if end is None else end[1] - origin.step
