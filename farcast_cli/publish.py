"""Putting forecasts in their places: written in one pass or judged first, each with its sidecar, and the leap in the ledger."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.engine.write import Tally, bytes_to_read, rehearse, total_bytes, write_forecasts
from farcast_cli.evaluation.judge import Judge, Trial, best_trial, logs_of
from farcast_cli.files.place import check_ours, check_sidecar_ours, sidecar_of
from farcast_cli.files.staged import Staging, refuse_existing, staging
from farcast_cli.forecast.forecaster_file import Fitted
from farcast_cli.forecast.ledger import Leap, recorded
from farcast_cli.request import Outcome, Prepared, Request
from farcast_cli.results import FittedOn
from farcast_cli.sidecar import compose, write_sidecar
from farcast_cli.trainers.base import unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.choices import CountersMode
    from farcast_cli.files.staged import Staging
    from farcast_cli.request import Outcome, Prepared, Request

STRENGTHS = (1.0, 0.5, 0.25)  # of the step, tried with an evaluation command

Progress = Callable[[str, int], Callable[[int], None]]
"""Starts a phase of so many bytes; what it returns is told the bytes done.

A phase of 0 bytes is one of unknown length, such as a run of the evaluation command; it is over when anything is told.
"""


def publish(
    prepared: Prepared, outcomes: Sequence[Outcome], request: Request, fitted: Fitted, progress: Progress
) -> list[Outcome]:
    if request.dry_run:
        return [_dry(prepared, outcome, index) for index, outcome in enumerate(outcomes)]
    with staging() as outputs:  # one for all horizons: what fails on the last publishes none
        write = _write_all if request.evaluator is None else _write_judged
        with unchanged((*prepared.snapshots, prepared.origin), copied=prepared.origin):
            finished = write(prepared, outcomes, request, fitted, outputs=outputs, progress=progress)
        leaps = [leap_of(outcome, fitted.directory, request.counters) for outcome in finished if outcome.path]
        if request.ledger is not None and request.purpose == "resume" and leaps:
            outputs.alongside(recorded(request.ledger, leaps))
        progress("sync to disk", 0)
    return finished


def _write_all(
    prepared: Prepared, outcomes: Sequence[Outcome], request: Request, fitted: Fitted, *, outputs: Staging, progress: Progress
) -> list[Outcome]:
    """Write every horizon in one pass."""
    staged = [_stage(outputs, prepared, target, request) for target in prepared.targets]
    places = [place for place, _ in staged]
    total = sum(total_bytes(plan) for plan in prepared.plans)
    tally = write_forecasts(prepared.plans, places, prepared.engine, progress=progress("predict", total))
    finished = [finish(prepared, outcome, tally, index) for index, outcome in enumerate(outcomes)]
    for outcome, (place, note) in zip(finished, staged, strict=True):
        write_sidecar(place, note, compose(prepared, outcome, request, written=place, fitted_on=_fitted_on(fitted)))
    return finished


def _write_judged(
    prepared: Prepared, outcomes: Sequence[Outcome], request: Request, fitted: Fitted, *, outputs: Staging, progress: Progress
) -> list[Outcome]:
    """Write every horizon at the strength that the user's command likes best."""
    return [
        _write_best(only(prepared, index), outcome, request, fitted, outputs=outputs, progress=progress)
        for index, outcome in enumerate(outcomes)
    ]


def _fitted_on(fitted: Fitted) -> FittedOn:
    """What a forecast's sidecar says of the fit."""
    return FittedOn(
        snapshots=len(fitted.steps),
        first_step=fitted.steps[0],
        last_step=fitted.steps[-1],
        samples_per_tensor=fitted.provenance.num_samples,
    )


def _stage(outputs: Staging, prepared: Prepared, target: Path, request: Request) -> tuple[Path, Path | None]:
    may_stay_empty = request.evaluator is not None
    is_file, overwrite = prepared.target.is_file, request.overwrite
    return stage(outputs, target, is_file=is_file, overwrite=overwrite, may_stay_empty=may_stay_empty)


def _write_best(
    prepared: Prepared, outcome: Outcome, request: Request, fitted: Fitted, *, outputs: Staging, progress: Progress
) -> Outcome:
    """Write the forecast at a few strengths, let the user's command judge each, stage the best if it beats the origin."""
    evaluator, target = request.evaluator, prepared.targets[0]
    assert evaluator is not None  # noqa: S101 - the caller's branch
    place, note = _stage(outputs, prepared, target, request)
    trials, written = _try_strengths(prepared, outcome, request, place, progress)
    best = best_trial(trials, maximize=evaluator.maximize)
    outcome = replace(outcome, trials=tuple(trials))
    if best.strength == 0:
        reason = f"no strength of the step beats the origin's {best.value:g} by the evaluation command"
        outcome = replace(outcome, decision=replace(outcome.decision, verdict="abstain", reason=reason))
        if not request.even_if_worse:
            return outcome
    kept, tally = written[best.strength or STRENGTHS[0]]
    kept.rename(place)
    finished = finish(prepared, outcome, tally, 0)
    write_sidecar(place, note, compose(prepared, finished, request, written=place, fitted_on=_fitted_on(fitted)))
    return finished


def _try_strengths(
    prepared: Prepared, outcome: Outcome, request: Request, place: Path, progress: Progress
) -> tuple[list[Trial], dict[float, tuple[Path, Tally]]]:
    """Score the origin and each strength; on disk at once are one candidate per job and the best so far."""
    evaluator, written = request.evaluator, dict[float, tuple[Path, Tally]]()
    assert evaluator is not None  # noqa: S101 - the caller's branch
    logs = logs_of(prepared.targets[0])
    variables = {"ORIGIN_STEP": outcome.origin_step, "VALID_STEP": outcome.valid_step}
    with Judge(evaluator, logs, variables, lambda what: progress(f"evaluate {what}", 0)) as judge:
        judge.start(0.0, judged_origin(prepared, place, progress))
        for strength in STRENGTHS:
            judge.wait(below=evaluator.num_jobs)
            _drop_beaten(written, judge.trials, request)
            candidate = place.parent / f"strength-{strength:g}" / place.name
            written[strength] = candidate, write_candidate(only(prepared, 0, strength), candidate, progress)
            judge.start(strength, candidate)
        judge.wait(below=1)
        best = best_trial(judge.trials, maximize=evaluator.maximize).strength or STRENGTHS[0]
        if best in written:
            judge.check(best, written[best][0])
        return judge.trials, written


def _drop_beaten(written: dict[float, tuple[Path, Tally]], trials: Sequence[Trial], request: Request) -> None:
    """Remove the candidates that another has beaten; the full step stays where it may be wanted whatever its score."""
    if not trials or request.evaluator is None:
        return
    spared = {best_trial(trials, maximize=request.evaluator.maximize).strength}
    spared |= {STRENGTHS[0]} if request.even_if_worse else set()
    for strength in {trial.strength for trial in trials}.intersection(written) - spared:
        candidate, _ = written.pop(strength)
        shutil.rmtree(candidate.parent)


def _dry(prepared: Prepared, outcome: Outcome, index: int) -> Outcome:
    one = only(prepared, index)
    foretold = rehearse(one.plans[0], one.engine, _existing(one.targets[0].parent))
    return replace(
        finish(prepared, outcome, Tally(unchanged=[0] * len(prepared.plans)), index),
        seconds=foretold.seconds,
        peak_bytes=foretold.peak_bytes,
        bytes_read=bytes_to_read(one.plans[0], one.engine.source),
        bytes_written=total_bytes(one.plans[0]),
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())


def stage(
    outputs: Staging, target: Path, *, is_file: bool, overwrite: bool, may_stay_empty: bool = False
) -> tuple[Path, Path | None]:
    """Where a forecast is written, and where its sidecar, if that lies beside it and not inside.

    The sidecar is added last and so published first: a forecast that can be seen has its provenance.
    """
    check = partial(check_ours, is_file=is_file) if overwrite else refuse_existing
    place = outputs.add(target, check=check, may_stay_empty=may_stay_empty)
    if not is_file:
        return place, None
    beside = sidecar_of(target, is_file=True)
    return place, outputs.add(beside, check=check_sidecar_ours, may_stay_empty=may_stay_empty)


def only(prepared: Prepared, index: int, scale: float = 1.0) -> Prepared:
    """One horizon of several, its step scaled."""
    source = prepared.engine.source
    return replace(
        prepared,
        engine=replace(prepared.engine, source=replace(source, linear=source.linear.pick([index], scale))),
        plans=(prepared.plans[index],),
        advanced=(prepared.advanced[index],),
        targets=(prepared.targets[index],),
    )


def write_candidate(one: Prepared, candidate: Path, progress: Progress) -> Tally:
    candidate.parent.mkdir()
    told = progress(f"predict {candidate.parent.name}", total_bytes(one.plans[0]))
    return write_forecasts(one.plans, [candidate], one.engine, progress=told)


def judged_origin(prepared: Prepared, place: Path, progress: Progress) -> Path:
    """The origin; in the container of the candidates where that is another, as the command can read those.

    Args:
        place: of the output to come. Candidates lie beside it, each in a folder of its own.
    """
    if prepared.target.layout == "same":
        return prepared.origin.path
    copied = place.parent / "strength-0" / place.name
    write_candidate(only(prepared, 0, 0.0), copied, progress)
    return copied


def leap_of(outcome: Outcome, run: Path, counters: CountersMode) -> Leap:
    """What the ledger says of a written checkpoint to resume from."""
    assert outcome.path is not None  # noqa: S101 - only written ones are resumed from
    return Leap(
        run=str(run.resolve()),
        origin_step=outcome.origin_step,
        valid_step=outcome.valid_step,
        counters=counters,
        forecast=str(outcome.path.resolve()),
    )


def finish(prepared: Prepared, outcome: Outcome, tally: Tally, index: int) -> Outcome:
    """What came of a forecast that has been written."""
    alignment, advanced = prepared.engine.source.alignment, prepared.advanced[index]
    moved = {change.where for change in advanced.changes}
    return replace(
        outcome,
        path=prepared.targets[index],
        num_forecast=len(alignment.tensors),
        copied=tuple(copied for copied in alignment.copied if copied.name not in moved),
        unchanged_share=tally.unchanged_share(index) if tally.num_forecast else None,
        bytes_read=tally.bytes_read,
        bytes_written=tally.bytes_written // max(1, len(prepared.plans)),
        seconds=tally.seconds,
        changes=tuple(f"{c.where}: {c.old} -> {c.new}" for c in advanced.changes),
        notes=tuple(advanced.notes),
    )
