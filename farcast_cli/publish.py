"""Putting forecasts in their places: written in one pass or judged first, each with its sidecar, and the leap in the ledger."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.agreement import agreed, bytes_of, numbers_of
from farcast_cli.card import write_card
from farcast_cli.engine.batch import Counts
from farcast_cli.engine.write import bytes_to_read, rehearse, total_bytes, write_forecasts
from farcast_cli.evaluation.judge import best_trial, logs_of
from farcast_cli.files.place import check_sidecar_ours, sidecar_of
from farcast_cli.files.reading import fetch, file_size, named_for_good, source_of
from farcast_cli.files.staged import staging
from farcast_cli.forecast.ledger import Leap
from farcast_cli.forecast.state_ledger import recorded_in_both
from farcast_cli.planning import existing_check
from farcast_cli.remote.upload import uploads_of
from farcast_cli.repeat import repeated
from farcast_cli.sidecar import compose, files_of, write_sidecar
from farcast_cli.trainers.base import unchanged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.choices import CountersMode
    from farcast_cli.evaluation.judge import Scorer, Trial
    from farcast_cli.files.staged import Staging
    from farcast_cli.progress import Progress
    from farcast_cli.records import FittedOn, ForecastSidecar, LeaptOn, MomentumEntry
    from farcast_cli.request import Outcome, Prepared, Request
    from farcast_cli.trainers.base import Snapshot

STRENGTHS = (1.0, 0.5, 0.25)  # of the step, tried with an evaluation command


@dataclass(frozen=True, slots=True)
class Publication:
    """What all forecasts of a request are published with: all together, or none."""

    request: Request
    run: Path
    on: FittedOn | LeaptOn
    """What the forecasts were made of, as their sidecars say."""
    outputs: Staging
    progress: Progress
    told: list[str] = field(default_factory=list)
    """What a person should know of the publication itself, once it is done."""


def publish(
    prepared: Prepared, outcomes: Sequence[Outcome], request: Request, *, run: Path, on: FittedOn, progress: Progress
) -> list[Outcome]:
    """Write every horizon that is not there yet, or say what writing it would take; publish all of them, or none."""
    planned = [_finish(prepared, outcome, Counts(), index) for index, outcome in enumerate(outcomes)]
    there = {
        index: same
        for index, outcome in enumerate(planned)
        if (same := repeated(prepared, index, outcome, request, on)) is not None
    }
    missing = [index for index in range(len(outcomes)) if index not in there]
    if request.dry_run:
        return [there.get(index) or _dry(prepared, outcome, index) for index, outcome in enumerate(outcomes)]
    if not request.team.leads:
        _help(some(prepared, missing), progress)
        return [there.get(index) or outcome for index, outcome in enumerate(planned)]
    with staging() as outputs:
        outputs.tell_end(request.team.close)
        work = Publication(request, run, on, outputs, progress)
        written = _write(work, some(prepared, missing), [outcomes[index] for index in missing]) if missing else []
        found = there | dict(zip(missing, written, strict=True))
        finished = [found[index] for index in range(len(outcomes))]
        record_leaps(work, finished, prepared.origin)
        for upload in uploads_of(outputs):
            outputs.tell_end(upload.end)
            upload.send(progress("upload", upload.num_bytes))
            outputs.alongside(upload.decided())
        progress("sync to disk", 0)
    return [replace(finished[0], notes=(*finished[0].notes, *work.told)), *finished[1:]]


def _write(work: Publication, prepared: Prepared, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write every horizon: in one pass, or each at the strength that the user's command prefers."""
    evaluator = work.request.evaluator
    _fetch(work, prepared)
    with unchanged((*prepared.snapshots, prepared.origin), copied=prepared.origin):
        if evaluator is None:
            return [outcome for outcome, _ in write_all(work, prepared, outcomes)]
        return [_write_best(work, evaluator, only(prepared, i), outcome) for i, outcome in enumerate(outcomes)]


def _fetch(work: Publication, prepared: Prepared) -> None:
    """Have the files here that the forecasts are made of, where the run is on a remote store."""
    files = {file for snapshot in prepared.snapshots for file in snapshot.weights_files} | prepared.origin.marks.keys()
    remote = [(file, 0, file_size(file)) for file in sorted(files) if source_of(file) is not None]
    if remote:
        fetch(remote, work.progress("fetch", sum(num_bytes for _, _, num_bytes in remote)))


def _help(prepared: Prepared, progress: Progress) -> None:
    """Write this rank's share of what rank 0 publishes."""
    if not prepared.plans:
        return
    with (
        prepared.engine.team.joined(prepared.paths, _agreed(prepared)) as places,
        unchanged((*prepared.snapshots, prepared.origin), copied=prepared.origin),
    ):
        write_forecasts(prepared.plans, places, prepared.engine, progress=progress("predict", 0))


def _agreed(prepared: Prepared) -> dict[str, str]:
    """What all ranks must have planned alike."""
    return agreed(
        (*prepared.snapshots, prepared.origin),
        bytes_of(prepared.paths, prepared.plans),
        coefficients=numbers_of(prepared.engine.inputs.linear),
    )


def write_all(
    work: Publication,
    prepared: Prepared,
    outcomes: Sequence[Outcome],
    *,
    phase: str = "predict",
    momentum: MomentumEntry | None = None,
) -> list[tuple[Outcome, ForecastSidecar]]:
    """Write every horizon in one pass, each with its sidecar."""
    staged = [_stage(work, prepared, path) for path in prepared.paths]
    total = sum(total_bytes(plan) for plan in prepared.plans)
    places = [place for place, _ in staged]
    team = prepared.engine.team
    if not team.is_alone:
        team.open(places, _agreed(prepared))
    tally = write_forecasts(prepared.plans, places, prepared.engine, progress=work.progress(phase, total))
    team.wait()
    written = []
    for index, (outcome, (place, beside)) in enumerate(zip(outcomes, staged, strict=True)):
        finished = _finish(prepared, outcome, tally, index)
        written.append((finished, _sign(work, prepared, finished, place, beside, momentum=momentum)))
    return written


def _sign(
    work: Publication,
    prepared: Prepared,
    finished: Outcome,
    place: Path,
    beside: Path | None,
    *,
    momentum: MomentumEntry | None = None,
) -> ForecastSidecar:
    """Say beside a forecast how it was made: in the model card where it has one, and last in the sidecar, which lists all files."""
    content = compose(prepared, finished, work.request, written=place, fitted_on=work.on, momentum=momentum)
    if prepared.container.card:
        work.told.extend(write_card(place, content, finished, prepared, work.request))
        content = content.model_copy(update={"files": files_of(place)})
    write_sidecar(place, beside, content)
    return content


def record_leaps(work: Publication, outcomes: Sequence[Outcome], origin: Snapshot) -> None:
    """Enter what has been written to resume from into the ledgers, together with its publication."""
    request = work.request
    leaps = [leap_of(work.run, outcome, outcome.path, request.counters, origin) for outcome in outcomes if outcome.path]
    if request.ledgers is not None and request.purpose == "resume" and leaps:
        work.outputs.alongside(recorded_in_both(request.ledgers, work.run, leaps, work.told.append))


def leap_of(run: Path, outcome: Outcome, forecast: Path, counters: CountersMode, origin: Snapshot) -> Leap:
    """What the ledgers say of a forecast."""
    return Leap(
        run=named_for_good(run),
        origin_step=outcome.origin_step,
        valid_step=outcome.valid_step,
        counters=counters,
        forecast=named_for_good(forecast),
        origin_digest=origin.full_digest,
    )


def _stage(work: Publication, prepared: Prepared, path: Path, *, may_stay_empty: bool = False) -> tuple[Path, Path | None]:
    """Where a forecast is written, and where its sidecar, if that lies beside it and not inside.

    The sidecar is added last and so published first: a forecast that can be seen has its provenance.
    """
    is_file, overwrite = prepared.container.is_one_file, work.request.overwrite
    place = work.outputs.add(
        path, check=existing_check(work.run, overwrite=overwrite, is_file=is_file), may_stay_empty=may_stay_empty
    )
    if not is_file:
        return place, None
    beside = sidecar_of(path, is_file=True)
    return place, work.outputs.add(beside, check=check_sidecar_ours, may_stay_empty=may_stay_empty)


def _finish(prepared: Prepared, outcome: Outcome, tally: Counts, index: int) -> Outcome:
    """What came of a forecast that has been written."""
    alignment, advanced = prepared.engine.inputs.alignment, prepared.advanced[index]
    moved = {change.where for change in advanced.changes}
    return replace(
        outcome,
        path=prepared.paths[index],
        num_forecast=len(alignment.tensors),
        copied=tuple(copied for copied in alignment.copied if copied.name not in moved),
        unchanged_share=tally.unchanged_share(index),
        bytes_read=tally.bytes_read,
        bytes_written=tally.bytes_written // max(1, len(prepared.plans)),
        seconds=tally.seconds,
        changes=tuple(f"{c.where}: {c.old} -> {c.new}" for c in advanced.changes),
        notes=tuple(advanced.notes),
    )


# --- judged by the user's command ------------------------------------------------------------------------------------


def only(prepared: Prepared, index: int, scale: float = 1.0) -> Prepared:
    """One horizon of several, its step scaled."""
    return some(prepared, [index], scale)


def some(prepared: Prepared, chosen: Sequence[int], scale: float = 1.0) -> Prepared:
    """Some horizons of several, their steps scaled."""
    inputs = prepared.engine.inputs
    return replace(
        prepared,
        engine=replace(prepared.engine, inputs=replace(inputs, linear=inputs.linear.pick(chosen, scale))),
        plans=tuple(prepared.plans[index] for index in chosen),
        advanced=tuple(prepared.advanced[index] for index in chosen),
        paths=tuple(prepared.paths[index] for index in chosen),
    )


def write_candidate(one: Prepared, candidate: Path, progress: Progress) -> Counts:
    """Write a forecast where the user's command judges it, in a folder of its own."""
    candidate.parent.mkdir()
    told = progress(f"predict {candidate.parent.name}", total_bytes(one.plans[0]))
    return write_forecasts(one.plans, [candidate], one.engine, progress=told)


def judged_origin(prepared: Prepared, place: Path, progress: Progress) -> Path:
    """The origin; in the container of the candidates where that is another, as the command can read those.

    Args:
        place: of the output to come. Candidates lie beside it, each in a folder of its own.
    """
    if prepared.container.layout == "same" and not prepared.container.inner:
        return prepared.origin.path
    copied = place.parent / "strength-0" / place.name
    write_candidate(only(prepared, 0, 0.0), copied, progress)
    return copied


def _write_best(work: Publication, evaluator: Scorer, prepared: Prepared, outcome: Outcome) -> Outcome:
    """Write the forecast at a few strengths, let the user's command judge each, stage the best if it beats the origin."""
    place, beside = _stage(work, prepared, prepared.paths[0], may_stay_empty=True)
    trials, written = _try_strengths(work, evaluator, prepared, outcome, place)
    best = best_trial(trials, maximize=evaluator.maximize)
    outcome = replace(outcome, trials=tuple(trials))
    if best.strength == 0:
        reason = f"no strength of the update scores better than the origin's {best.value:g} in the evaluation command"
        outcome = replace(outcome, decision=replace(outcome.decision, verdict="abstain", reason=reason))
        if not work.request.even_if_worse:
            return outcome
    strength = best.strength or STRENGTHS[0]
    kept, tally = written[strength]
    kept.rename(place)
    finished = _finish(prepared, outcome, tally, 0)
    _sign(work, only(prepared, 0, strength), finished, place, beside)
    return finished


def _try_strengths(
    work: Publication, evaluator: Scorer, prepared: Prepared, outcome: Outcome, place: Path
) -> tuple[list[Trial], dict[float, tuple[Path, Counts]]]:
    """Score the origin and each strength; on disk at once are one candidate per job and the best so far."""
    written = dict[float, tuple[Path, Counts]]()
    logs = logs_of(prepared.paths[0])
    variables = {"ORIGIN_STEP": outcome.origin_step, "VALID_STEP": outcome.valid_step}
    with evaluator.judge(logs, variables, lambda what: work.progress(f"evaluate {what}", 0)) as judge:
        judge.start(0.0, judged_origin(prepared, place, work.progress))
        for strength in STRENGTHS:
            judge.wait(below=evaluator.num_jobs)
            _drop_beaten(written, judge.trials, evaluator, keep_full=work.request.even_if_worse)
            candidate = place.parent / f"strength-{strength:g}" / place.name
            written[strength] = candidate, write_candidate(only(prepared, 0, strength), candidate, work.progress)
            judge.start(strength, candidate)
        judge.wait(below=1)
        best = best_trial(judge.trials, maximize=evaluator.maximize).strength or STRENGTHS[0]
        if best in written:
            judge.check(best, written[best][0])
        return judge.trials, written


def _drop_beaten(
    written: dict[float, tuple[Path, Counts]], trials: Sequence[Trial], evaluator: Scorer, *, keep_full: bool
) -> None:
    """Remove the candidates that another has beaten; the full step stays where it may be wanted whatever its score."""
    if not trials:
        return
    spared = {best_trial(trials, maximize=evaluator.maximize).strength, *(STRENGTHS[:1] if keep_full else ())}
    for strength in {trial.strength for trial in trials}.intersection(written) - spared:
        candidate, _ = written.pop(strength)
        shutil.rmtree(candidate.parent)


# --- a dry run -------------------------------------------------------------------------------------------------------


def _dry(prepared: Prepared, outcome: Outcome, index: int) -> Outcome:
    one = only(prepared, index)
    foretold = rehearse(one.plans[0], one.engine, _existing(one.paths[0].parent))
    return replace(
        _finish(prepared, outcome, Counts(), index),
        seconds=foretold.seconds,
        peak_bytes=foretold.peak_bytes,
        bytes_read=bytes_to_read(one.plans[0], one.engine.inputs),
        bytes_written=total_bytes(one.plans[0]),
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
