"""What came of a command, as its answer: the library's results in the form that `results` describes."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli import records, results
from farcast_cli.reports.panels import facts, headline
from farcast_cli.run.losses import LOSS_KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.forecast.fitting import FitOutcome
    from farcast_cli.forecast.history import Past
    from farcast_cli.forecast.judgement import BacktestReport, Direction
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.keeping import Keeping
    from farcast_cli.leaps.ask import Leapt
    from farcast_cli.reports.story import Story
    from farcast_cli.request import Outcome
    from farcast_cli.run.selection import Inspection
    from farcast_cli.tune.request import TuneOutcome as Tuning
    from farcast_cli.watching import Event


def of_error(code: int, message: str, *, hint: str = "", path: Path | None = None) -> results.ErrorAnswer:
    entry = results.ErrorEntry(code=code, message=message, hint=hint or None, path=path)
    return results.ErrorAnswer(schema_version=1, error=entry)


def of_inspect(found: Inspection, past: Past | None, worth: Worth | None = None) -> results.InspectAnswer:
    trajectory, alignment = found.trajectory, found.alignment
    leap, problem = (past.history.leap, past.problem) if past else (None, None)
    return results.InspectAnswer(
        schema_version=1,
        step_from=trajectory.rule.source,
        unit=trajectory.rule.unit,
        layout=trajectory.layout,
        snapshots=tuple(
            results.SnapshotEntry(
                path=s.path,
                step=s.step,
                step_source=s.step_source,
                bytes=s.num_bytes,
                evidence=tuple(results.EvidenceEntry(source=e.source, where=e.where, step=e.step) for e in s.evidence),
            )
            for s in trajectory.snapshots
        ),
        num_tensors=len(alignment.tensors) if alignment else 0,
        num_parameters=alignment.num_parameters if alignment else 0,
        copied=tuple(records.CopiedEntry(name=c.name, reason=c.reason) for c in alignment.copied) if alignment else (),
        ignored=tuple(results.IgnoredEntry(path=i.path, reason=i.reason) for i in trajectory.ignored),
        notes=(*trajectory.notes, *(past.cautions if past else ())),
        problems=(*found.problems, *([f"{problem}; {problem.hint}"] if problem else [])),
        leaps=tuple(
            results.LeapEntry(
                origin_step=one.origin_step,
                valid_step=one.valid_step,
                counters=one.counters,
                forecast=Path(one.forecast) if one.forecast else None,
            )
            for one in (past.leaps if past else ())
        ),
        leap=leap.resumes_after if leap else None,
        worth=_worth(worth),
    )


def _worth(worth: Worth | None) -> results.WorthEntry | None:
    if worth is None:
        return None
    return results.WorthEntry(
        origin_step=worth.origin_step,
        resumes_after=worth.resumes_after,
        kind=worth.kind,
        trained=worth.trained,
        loss_before=worth.before,
        loss_after=worth.after,
        loss_of_curve=worth.curve,
        standard_error=worth.error,
        steps_sooner=worth.sooner,
        is_limit=worth.is_limit,
    )


def of_fit(done: FitOutcome, path: Path | None) -> results.FitAnswer:
    fitted, steady, record = done.fitted, done.steady, done.fitted.provenance
    return results.FitAnswer(
        schema_version=1,
        step_from=fitted.rule.source,
        unit=fitted.rule.unit,
        forecaster=path,
        origin_step=fitted.steps[-1],
        num_snapshots=len(fitted.steps),
        leap=record.leap.resumes_after if record.leap else None,
        notes=(*record.notes, *done.cautions, *done.jumps, *filter(None, [done.carrier])),
        num_tensors=len(record.tensors),
        sampled=record.num_samples,
        coherence=steady.coherence,
        recent_coherence=steady.recent,
        significance=steady.significance.p,
        bytes_read=done.bytes_read,
        seconds=done.seconds,
        worth=_worth(done.worth),
    )


def of_keep(done: Keeping) -> results.KeepAnswer:
    return results.KeepAnswer(
        schema_version=1,
        step_from=done.rule.source,
        unit=done.rule.unit,
        folder=done.folder,
        added=done.added,
        removed=done.removed,
        snapshots=tuple(
            results.KeptEntry(path=one.path, step=one.step, bytes=one.num_bytes, checkpoint_bytes=one.source.num_bytes)
            for one in done.snapshots
            if one.source
        ),
        bytes=done.num_bytes,
        checkpoint_bytes=done.whole_bytes,
        cautions=done.cautions,
    )


def of_backtest(report: BacktestReport) -> results.BacktestAnswer:
    scores, decisions = report.scores, report.decisions
    best = min((score for score in scores if math.isfinite(score.ratio)), key=lambda score: score.ratio, default=None)
    verdicts = {str(horizon): decision.verdict for horizon, (_, decision) in decisions.items()}
    return results.BacktestAnswer(
        schema_version=1,
        step_from=report.rule.source,
        unit=report.rule.unit,
        origin_step=report.origin_step,
        coherence=report.steady.coherence,
        significance=report.steady.significance.p,
        clock=report.pace.clock,
        scores=_scores(report),
        best=results.BestEntry(method=best.method, horizon=best.horizon, ratio=best.ratio) if best else None,
        verdict=next(iter(verdicts.values())) if len(verdicts) == 1 else verdicts,
        decisions=tuple(
            results.DecisionEntry(
                horizon=horizon,
                method=method,
                verdict=d.verdict,
                ratio=d.ratio,
                recent_coherence=d.recent,
                reason=d.reason,
            )
            for horizon, (method, d) in decisions.items()
        ),
    )


def of_report(story: Story, path: Path | None) -> results.ReportAnswer:
    said, (horizon, method) = headline(story), story.tested
    return results.ReportAnswer(
        schema_version=1,
        path=path,
        title=said.title,
        why=said.why,
        sure=said.sure,
        next=said.next_step,
        forecast=_forecast(story.proposal.outcome),
        moves=results.MovesEntry(steps=story.moves.steps, cosines=tuple(map(tuple, story.moves.cosines.tolist()))),
        directions=tuple(map(_direction, story.directions)),
        scores=_scores(story.backtest),
        tensors=results.TensorsEntry(
            horizon=horizon,
            method=method,
            errors=tuple(
                results.TensorErrorEntry(name=one.name, num_elements=one.num_elements, ratio=one.ratio) for one in story.tensors
            ),
        ),
        losses=tuple(
            results.LossEntry(kind=kind, step=step, loss=loss)
            for kind in LOSS_KINDS
            for step, loss in story.course.points(kind)
        ),
        leaps=tuple(results.MadeLeapEntry(step=step, horizon=length) for step, length in story.course.leaps),
        facts=dict(facts(story)),
    )


def _direction(found: Direction) -> results.DirectionEntry:
    return results.DirectionEntry(
        step=found.step,
        horizon=found.horizon,
        coherence=found.steady.coherence,
        needed=found.needed.whole,
        recent_coherence=found.steady.recent,
        needed_recent=found.needed.recent,
        significance=found.steady.significance.p,
        highest_significance=found.steady.significance.limit,
        is_steady=found.is_steady,
    )


def _scores(report: BacktestReport) -> tuple[results.ScoreEntry, ...]:
    return tuple(
        results.ScoreEntry(method=s.method, horizon=s.horizon, ratio=s.ratio, ratio_as_written=s.ratio_as_written)
        for s in report.scores
    )


def of_predict(outcomes: Sequence[Outcome], *, dry_run: bool) -> results.PredictAnswer | results.PredictManyAnswer:
    forecasts = tuple(_forecast(outcome) for outcome in outcomes)
    if len(forecasts) == 1:
        return results.PredictAnswer(schema_version=1, **dict(forecasts[0]), dry_run=dry_run)
    return results.PredictManyAnswer(schema_version=1, forecasts=forecasts, dry_run=dry_run)


def _forecast(outcome: Outcome) -> results.Forecast:
    decision = outcome.decision
    return results.Forecast(
        step_from=outcome.rule.source,
        unit=outcome.rule.unit,
        path=outcome.path,
        origin_step=outcome.origin_step,
        valid_step=outcome.valid_step,
        horizon=outcome.horizon,
        method=outcome.method,
        ratio=decision.ratio,
        expected_ratio=decision.expected,
        coherence=decision.coherence,
        recent_coherence=decision.recent,
        clock=outcome.pace.clock,
        pace_ahead=outcome.pace_ahead,
        length_factor=outcome.length_factor,
        significance=decision.significance.p,
        verdict=decision.verdict,
        reason=decision.reason,
        chosen=outcome.chosen,
        num_forecast=outcome.num_forecast,
        num_copied=outcome.num_copied,
        unchanged_share=None if outcome.unchanged_share is None else round(outcome.unchanged_share, 6),
        bytes_read=outcome.bytes_read,
        bytes_written=outcome.bytes_written,
        seconds=outcome.seconds,
        changes=outcome.changes,
        notes=outcome.notes,
        existed=outcome.existed,
        evaluations=tuple(
            records.EvaluationEntry(strength=t.strength, value=t.value, seconds=t.seconds, log=t.log) for t in outcome.trials
        ),
    )


def of_leap(done: Leapt, *, dry_run: bool) -> results.LeapAnswer:
    outcome, momentum = done.outcome, done.momentum
    return results.LeapAnswer(
        schema_version=1,
        step_from=outcome.rule.source,
        unit=outcome.rule.unit,
        path=outcome.path,
        origin=done.origin,
        origin_step=outcome.origin_step,
        horizon=outcome.horizon,
        verdict=outcome.decision.verdict,
        reason=outcome.decision.reason,
        gain=momentum.gain,
        share=momentum.share,
        cosine=done.cosine,
        loss_signal=done.signal,
        stretches=momentum.count,
        clock=done.clock,
        every=done.every,
        again=done.is_again,
        unchanged_share=outcome.unchanged_share,
        changes=outcome.changes,
        notes=(*done.notes, *outcome.notes),
        evaluations=tuple(results.TrialEntry(strength=t.strength, value=t.value, seconds=t.seconds) for t in outcome.trials),
        worth=_worth(done.worth),
        dry_run=dry_run,
    )


def of_watch(event: Event, run: Path) -> results.WatchAnswer:
    """One event."""
    return results.WatchAnswer(
        schema_version=1, time=datetime.now(UTC).isoformat(timespec="seconds"), run=run, **_of_event(event)
    )


def _of_event(event: Event) -> dict[str, Any]:
    from farcast_cli import watching  # not for an error, which no numpy need be imported for

    match event:
        case watching.NewVerdict():
            own = {"num_snapshots", "verdict", "words", "reason", "horizon", "coherence", "significance", "ratio"}
            found = {name: getattr(event, name) for name in own}
            told = {"step_from": event.rule.source, "unit": event.rule.unit, "since_leap": event.leap}
            return found | told | {"event": "judged", "origin_step": event.step}
        case watching.LeapWritten(step, path, valid_step, existed, unit):
            found = {"origin_step": step, "path": path, "valid_step": valid_step, "existed": existed}
            return found | {"event": "leap", "unit": unit}
        case watching.CommandEnded(checkpoint, log, seconds, failed):
            return {"event": "command", "path": checkpoint, "log": log, "seconds": seconds, "failed": failed or None}
        case watching.Trouble(text, hint):
            return {"event": "problem", "message": text, "hint": hint or None}
        case watching.Waiting(what, step, age_s):
            return {"event": "waiting", "origin_step": step, "message": what, "seconds": age_s}
        case watching.WatchEnded(step, reason):
            return {"event": "end", "origin_step": step, "reason": reason}


def of_tune(tuning: Tuning) -> results.TuneAnswer:
    verdict = tuning.verdict
    return results.TuneAnswer(
        schema_version=1,
        path=tuning.path,
        layers=tuning.layers,
        method=tuning.method,
        verdict=("covariance" if tuning.method == "covariance" else "applied")
        if verdict is None
        else "tuned"
        if verdict.is_accepted
        else "no significant gain",
        held_out_before=verdict.before if verdict else None,
        held_out_after=verdict.after if verdict else None,
        z=verdict.z if verdict else None,
        tuned_before=tuning.tuned_loss[0] if verdict else None,
        tuned_after=tuning.tuned_loss[1] if verdict else None,
        judged_by=verdict.judged_by if verdict else None,
        num_rows=tuning.num_rows,
        iterations=tuning.iterations,
        relative_change=tuning.sizes,
        passes=tuning.num_passes,
        bytes_read=tuning.bytes_read,
        bytes_written=tuning.bytes_written,
        seconds=tuning.seconds,
        notes=tuning.notes,
        existed=tuning.existed,
    )
