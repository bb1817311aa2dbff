"""Everything that is printed: tables, progress, JSON, errors. The only module that does.

stdout carries the result, stderr everything else. Bars and colour appear on a terminal only; NO_COLOR is honoured.
"""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as escape_markup
from rich.text import Text

from farcast_cli.commands.cautions import cautions_of
from farcast_cli.commands.grouped import by_kind, copied_texts, like_each_other
from farcast_cli.commands.tables import LEAST_NAME, Column, bar, fitted_table
from farcast_cli.errors import as_addresses, listed, printable, shell_word, visible
from farcast_cli.forecast.words import chance, clock_line, counted, recent_half, shown_number
from farcast_cli.headline import advised
from farcast_cli.progress import silent
from farcast_cli.run.selection import options_of
from farcast_cli.settings import source_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from farcast_cli.answer import Answer
    from farcast_cli.choices import Purpose
    from farcast_cli.errors import FarcastError
    from farcast_cli.forecast.backtest import Decision, Score, Steadiness
    from farcast_cli.forecast.fitting import FitOutcome, FitPlan
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.history import Past
    from farcast_cli.forecast.judgement import BacktestReport
    from farcast_cli.forecast.worth import Worth
    from farcast_cli.keeping import Keeping
    from farcast_cli.progress import Progress
    from farcast_cli.request import Outcome, Request
    from farcast_cli.results import VerifyAnswer
    from farcast_cli.run.alignment import Copied
    from farcast_cli.run.selection import Inspection
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot
    from farcast_cli.tune.request import TuneOutcome as Tuning

LEAST_METHOD = 16  # columns of a method, on a narrow terminal
MARKED = "<-"  # the row of the method that predict uses, where there is no place for words
MAX_ROWS = 12
MAX_METHODS = 3  # of a back-test, at each horizon
MAX_NAMES = 10  # of what is left out or copied for one reason
WIDE = 10_000  # columns of a file or a pipe: nothing is cut short there


def escape(text: str) -> str:
    """A text from outside, as a console shows it: without markup, and without what a terminal would obey."""
    return escape_markup(printable(text))


def stdout() -> Console:
    return Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDE)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else WIDE)


def error(problem: FarcastError) -> None:
    console = stderr()
    console.print(f"[bold red]error:[/] {escape(str(problem))}", soft_wrap=True)
    if problem.hint:
        console.print(f"[bold]hint:[/] {escape(problem.hint)}", soft_wrap=True)


def note(text: str, *, quiet: bool = False) -> None:
    if not quiet:
        stderr().print(escape(text), soft_wrap=True)


def unlogged(failures: Sequence[str]) -> None:
    """What could not be logged; said to those who want only errors, too."""
    for text in failures:
        note(f"caution: {text}")


def paths(found: Sequence[Path]) -> None:
    """The result of a command that writes: paths, one a line, and nothing else.

    A pipe gets the very bytes of the name, whatever the locale; a terminal nothing that it would obey. A line cannot hold a
    path with a newline in it.
    """
    for path in found:
        text = as_addresses(str(path))
        if text == visible(text) if sys.stdout.isatty() else "\n" not in text:
            _write_bytes(text)
        else:
            sys.stdout.write(visible(text) + "\n")
            note(
                "caution: the path contains characters that a line cannot show; it is printed escaped: --json gives it unchanged"
            )


def _write_bytes(text: str) -> None:
    """A line as the bytes that name a file; a text that is collected in memory has no bytes."""
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:
        sys.stdout.write(text + "\n")
        return
    sys.stdout.flush()
    raw.write(os.fsencode(text) + b"\n")
    raw.flush()


def as_json(answer: Answer) -> None:
    sys.stdout.write(as_addresses(answer.as_json()) + "\n")


def text(content: str) -> None:
    """A result of several lines; a character that the stream cannot take is shown as a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(content.encode(encoding, "replace").decode(encoding))


def has_terminal() -> bool:
    """Whether a person sees both streams on a terminal that can move its cursor."""
    return sys.stdout.isatty() and sys.stderr.isatty() and not stderr().is_dumb_terminal


def has_blocks() -> bool:
    """Whether stdout takes blocks and dashes."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def schema(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A bar with bytes, rate and time left for each phase, on a terminal; silence elsewhere.

    A phase of no known length has its name and the time since its start, until it is told anything.
    """
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    from rich.progress import Progress as Bars

    from farcast_cli.commands.progress_line import columns_for

    console = stderr()
    with Bars(*columns_for(console.width), console=console, transient=True) as bars:

        def start(phase: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(phase, total=total or None)
            return lambda done: bars.advance(task, done) if total else bars.update(task, visible=False)

        yield start


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:  # noqa: PLR2004 - decimal units, as disks are sold
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _bars(ratios: Iterable[float]) -> tuple[Text, ...]:
    return tuple(Text(bar(ratio, is_utf=has_blocks()), style="green" if ratio < 1 else "red") for ratio in ratios)


def _texts(words: Iterable[object]) -> tuple[Text, ...]:
    """Cells of a table: names from files may hold what a terminal would obey."""
    return tuple(Text(printable(str(word))) for word in words)


# --- inspect ---------------------------------------------------------------------------------------------------------


def inspection(found: Inspection, past: Past | None, worth: Worth | None, *, verbose: bool = False) -> None:
    console, trajectory, alignment = stdout(), found.trajectory, found.alignment
    count = len(trajectory.snapshots)
    console.print(f"[bold]{escape(str(trajectory.directory))}[/]: {count} {trajectory.layout} snapshots")
    console.print(fitted_table(_snapshot_columns(trajectory.snapshots), console.width))
    for text in _evidence(trajectory.snapshots, verbose=verbose):
        console.print(escape(text), soft_wrap=True)
    if alignment:
        console.print(f"forecast: {len(alignment.tensors)} tensors, {alignment.num_parameters:,} parameters")
        for tensor in alignment.tensors if verbose else ():
            entry = tensor.entries[-1]
            console.print(f"  {escape(tensor.name)}  {entry.dtype.name} {escape(str(list(entry.shape)))}", soft_wrap=True)
        _grouped(console, "forecast", [(t.name, t.remark) for t in alignment.tensors if t.remark])
        _grouped(console, "copied", [(c.name, c.reason if verbose else c.kind) for c in alignment.copied])
    others = [(i.path.name, i.reason) for i in trajectory.ignored if not i.is_half_written]
    _grouped(console, "[yellow]left out[/]", [(i.path.name, i.reason) for i in trajectory.half_written], verbose=verbose)
    _grouped(console, "not part of the run", others, verbose=verbose)
    for text in trajectory.notes:
        console.print(f"note: {escape(text)}", soft_wrap=True)
    problems = [*found.problems, *(_of_leaps(console, past) if past else ())]
    if worth:
        console.print(escape(worth.told()), soft_wrap=True)
    for problem in problems if verbose else like_each_other(problems):
        console.print(f"[yellow]problem:[/] {escape(problem)}", soft_wrap=True)
    if not problems:
        console.print(f"next: {escape(_fit_command(trajectory))}", soft_wrap=True)


def _snapshot_columns(snapshots: Sequence[Snapshot]) -> Iterator[Column]:
    unit = snapshots[0].unit if snapshots else "step"
    yield Column(unit, _texts(s.step if s.step >= 0 else "?" for s in snapshots), "right")
    yield Column("source", _texts(s.step_source for s in snapshots), rank=1)
    yield Column("snapshot", _texts(s.path.name for s in snapshots), least=LEAST_NAME)
    yield Column("size", _texts(size(s.num_bytes) for s in snapshots), "right")


def _evidence(snapshots: Sequence[Snapshot], *, verbose: bool) -> Iterator[str]:
    """Where it disagrees or there is none, a line for each snapshot; all of it where asked for."""
    for s in snapshots:
        if verbose or s.step < 0 or any(e.step != s.step for e in s.evidence):
            told = ", ".join(e.where + ("" if e.step == s.step else f" = {e.step}") for e in s.evidence)
            yield f"evidence for {s.unit} {s.step if s.step >= 0 else '?'} of {s.path.name}: {told or 'none'}"


def _of_leaps(console: Console, past: Past) -> list[str]:
    """The leaps of the run and what `fit` makes of them; returns the problem with that, if there is one."""
    history = past.history
    count = f"all {len(history.trajectory.snapshots)} snapshots"
    if history.leap:
        used = f"the run resumed from {history.leap.name}, a leap to step {history.leap.resumes_after}: fit uses the"
        used += f" {len(history.trajectory.snapshots)} snapshots after it, not the {history.num_before} before it"
    elif past.unused:
        used = f"--steps overrides the ledger: fit uses {count}"
    else:
        used = f"the snapshots do not show that the run resumed from one: fit uses {count}"
    if past.leaps:
        console.print(f"leaps in the ledger: {len(past.leaps)}; {escape(used)}", soft_wrap=True)
    for text in past.cautions:
        console.print(escape(text), soft_wrap=True)
    return [f"{past.problem}; {past.problem.hint}"] if past.problem else []


def _grouped(console: Console, title: str, items: Sequence[tuple[str, str]], *, verbose: bool = False) -> None:
    for reason, names in by_kind(items).items():
        shown = listed(names, most=len(names) if verbose else MAX_NAMES)
        console.print(f"{title}: {escape(shown)} ({escape(reason)})", soft_wrap=True)


def _fit_command(trajectory: Trajectory) -> str:
    """With what the run cannot be read without."""
    found = trajectory
    chosen = options_of(steps=found.chosen, pattern=found.pattern, rule=found.rule, weights=found.weights)
    return f"farcast fit {shell_word(found.directory)}{chosen}"


def copied_note(copied: Sequence[Copied], *, verbose: bool) -> None:
    for text in copied_texts(copied, verbose=verbose):
        note(text)


# --- keep ------------------------------------------------------------------------------------------------------------


def keeping(done: Keeping) -> None:
    for text in done.cautions:
        note(f"caution: {text}")
    count = f"{len(done.snapshots)} kept snapshot" + "s" * (len(done.snapshots) != 1)
    news = f"{len(done.added)} new" + (f", {len(done.removed)} removed" if done.removed else "")
    note(f"{count} in {done.folder} ({news}), {size(done.num_bytes)}; whole checkpoints would be {size(done.whole_bytes)}")


# --- fit and backtest ------------------------------------------------------------------------------------------------


def fit_cautions(plan: FitPlan) -> None:
    """What a person should know of the folder before its run is forecast."""
    for text in cautions_of(plan):
        note(text)


def fit_summary(done: FitOutcome, output: Path, *, verbose: bool) -> None:
    fitted, steady, record = done.fitted, done.steady, done.fitted.provenance
    what = "all values" if record.num_samples is None else f"up to {record.num_samples:,} values of each tensor"
    note(
        f"fitted {len(fitted.steps)} snapshots, {record.unit}s {fitted.steps[0]} to {fitted.steps[-1]}: {len(record.tensors)} tensors forecast,"
        f" {sum(one.num_tensors for one in fitted.copied)} copied,"
        f" {what}, {size(done.bytes_read)} in {done.seconds:.1f} s"
    )
    note(_direction(fitted, steady, verbose=verbose))
    for remark, names in by_kind((tensor.name, tensor.remark) for tensor in record.tensors if tensor.remark).items():
        note(f"forecast: {listed(names, most=MAX_NAMES)} ({remark})")
    copied_note(fitted.copied, verbose=verbose)
    for text in filter(None, (*done.jumps, done.carrier)):
        note(text)
    if done.worth:
        note(done.worth.told())
    outcome = _proposed(fitted, "resume")
    note(_would_say(outcome, "resume"))
    from_file = source_of(output, fitted)
    ways = {
        f"farcast predict{from_file}": outcome.decision.verdict == "forecast",
        "keep training and fit again": not outcome.decision.is_over,
    }
    first = next((f"{way}, or " for way, holds in ways.items() if holds), "")
    note(
        f"next: {first}farcast predict{from_file} --for evaluation; farcast backtest{from_file} and farcast report{from_file}"
        " show the evidence"
    )


def proposal(fitted: Fitted, purpose: Purpose) -> str:
    """What `predict` would say of a run, without a horizon."""
    return _would_say(_proposed(fitted, purpose), purpose)


def _proposed(fitted: Fitted, purpose: Purpose) -> Outcome:
    from farcast_cli.prediction import proposed
    from farcast_cli.request import Request

    return proposed(fitted, Request(purpose=purpose))[0].outcomes[0]


def _would_say(outcome: Outcome, purpose: Purpose) -> str:
    return f"farcast predict would say: {advised(outcome, purpose).line}"


def _direction(fitted: Fitted, steady: Steadiness, *, verbose: bool) -> str:
    """S and p of a run; with -v also what they allow over a short horizon."""
    from farcast_cli.forecast.judgement import direction_ahead

    if not math.isfinite(steady.coherence):
        return "direction of the run: S unknown: it needs two snapshots in each half of the history, and weights that move"
    known = f"S = {shown_number(steady.coherence)}, {chance(steady.significance)}; {recent_half(steady.recent)}"
    if not verbose:
        return f"direction of the run: {known}"
    found = direction_ahead(fitted)
    ahead = f"to resume from a forecast {counted(found.horizon, fitted.rule.unit)} ahead"
    verdict = (
        f"steady enough {ahead}, if its back-test passes" if found.is_steady else f"not steady enough {ahead} ({found.reason})"
    )
    return f"direction of the run: {known}; {verdict}"


def backtest(report: BacktestReport, *, verbose: bool) -> None:
    """The verdicts first, then the numbers of the best methods and of the chosen one."""
    console, steady = stdout(), report.steady
    unit = report.rule.unit
    console.print(f"back-test at origin {report.origin_step}" + (f"; the unit is the {unit}" if unit != "step" else ""))
    for horizon, (method, decision) in report.decisions.items():
        console.print(f"horizon {horizon}, {method}: [bold]{decision.verdict}[/] ({escape(decision.reason)})")
    has_coherence = math.isfinite(steady.coherence)
    console.print(
        f"coherence S = {steady.coherence:.2f}, {chance(steady.significance)}"
        if has_coherence
        else "coherence S: too few snapshots"
    )
    console.print(escape(clock_line(report.pace, unit=unit)), soft_wrap=True)
    if report.scores:
        _scores(console, report, verbose=verbose)
    for why in report.reasons:
        note(f"auto: {why}")
    if verbose:
        from farcast_cli.forecast.methods import METHODS

        for known in METHODS.values():
            note(f"{known.name}: {known.summary}")


def _scores(console: Console, report: BacktestReport, *, verbose: bool) -> None:
    console.print("\nerror relative to no forecast: 0 is perfect, 1 (the mark in a bar) is no better than no forecast")
    console.print("b: of an update no longer than the run's past move; as written: of the update that predict writes")
    table = fitted_table(_score_columns(report, verbose=verbose), console.width)
    console.print(table)
    if any(str(cell) == MARKED for cell in table.columns[-1].cells):
        console.print(f"{MARKED} predict's method; its verdict is above")
    num_methods = len({score.method for score in report.scores})
    if num_methods > MAX_METHODS and not verbose:
        console.print(f"the best {MAX_METHODS} of {num_methods} methods at each horizon, and predict's (-v shows all)")


def _score_columns(report: BacktestReport, *, verbose: bool) -> Iterator[Column]:
    scores = _shown_scores(report, most=None if verbose else MAX_METHODS)
    written = _texts(f"{score.ratio_as_written:.2f}" for score in scores)
    yield Column("horizon", _texts(score.horizon for score in scores), "right")
    yield Column("method", _texts(score.method for score in scores), least=LEAST_METHOD)
    yield Column("b", _texts(f"{score.ratio:.2f}" for score in scores), "right")
    yield Column("", _bars(score.ratio for score in scores), rank=1)
    yield Column("as written", written, "right", rank=3, instead=(Column("written", written, "right"),))
    does = [_does(report, score) for score in scores]
    yield Column("", _texts(does), rank=2, instead=(Column("", _texts(MARKED if text else "" for text in does)),))


def _does(report: BacktestReport, score: Score) -> str:
    """What predict does with the method of a row, if it is the one that the verdict is on."""
    method, decision = report.decisions[score.horizon]
    if score.method != method:
        return ""
    return "<- predict writes this" if decision.verdict == "forecast" else "<- predict writes none"


def _shown_scores(report: BacktestReport, *, most: int | None) -> list[Score]:
    """By horizon, the methods with the smallest b, at most so many, and the one that the verdict is on."""
    found = []
    for horizon in sorted({score.horizon for score in report.scores}):
        scores = sorted((score for score in report.scores if score.horizon == horizon), key=lambda score: score.ratio)
        chosen = report.decisions[horizon][0]
        found += [score for place, score in enumerate(scores) if most is None or place < most or score.method == chosen]
    return found


# --- predict ---------------------------------------------------------------------------------------------------------


def predictions(outcomes: Sequence[Outcome], notes: Sequence[str], request: Request, *, hint: str, verbose: bool) -> None:
    """What came of each horizon, what a person should know before using it, and what to do if nothing was written.

    The steps, verdicts and paths come first. What is true of several horizons is said once.
    """
    for outcome in outcomes:
        note(advised(outcome, request.purpose, is_one_of_many=len(outcomes) > 1).line)
        for text in _result(outcome, purpose=request.purpose, dry_run=request.dry_run, verbose=verbose):
            note(text)
    for text in dict.fromkeys(text for outcome in outcomes for text in _details(outcome, verbose=verbose)):
        note(text)
    for text in notes:
        note(f"note: {text}")
    if hint:
        note(f"hint: {hint}")


def _result(outcome: Outcome, *, purpose: Purpose, dry_run: bool, verbose: bool) -> Iterator[str]:
    """The path; with -v the numbers that decided."""
    decision = outcome.decision
    head = f"{outcome.rule.unit} {outcome.origin_step} + {outcome.horizon}: {decision.verdict}"
    if outcome.path is None:
        yield f"{head}: nothing written"
    elif outcome.existed:
        yield f"{head}: already there, made from the same snapshots with the same options: nothing was written"
    else:
        yield f"{head}: {_written(outcome, dry_run=dry_run)}"
    if verbose:
        yield _expected(decision, purpose)


def _details(outcome: Outcome, *, verbose: bool) -> Iterator[str]:
    """What was chosen for the user, copied, advanced and evaluated."""
    yield from outcome.chosen
    if verbose or outcome.pace.why or outcome.length_factor != 1:
        yield clock_line(outcome.pace, outcome.pace_ahead, outcome.length_factor, unit=outcome.rule.unit)
    if outcome.path is not None and not outcome.existed:
        yield from copied_texts(outcome.copied, verbose=verbose)
        yield from (text if text.startswith("caution: ") else f"note: {text}" for text in outcome.notes)
        yield from (f"  {text}" for text in outcome.changes if verbose)
        if outcome.changes and not verbose:
            count = len(outcome.changes)
            yield f"{count} {'counter or rate' if count == 1 else 'counters and rates'} advanced (-v lists them)"
    for trial in outcome.trials:
        what = f"strength {trial.strength:g}: {trial.value:g}" + ("" if trial.strength else " (the origin)")
        yield f"evaluation at {what}, in {trial.seconds:.1f} s" + (f", output in {trial.log}" if trial.log and verbose else "")
    if outcome.trials and outcome.trials[0].log:
        yield f"output of --eval-cmd: {outcome.trials[0].log.parent}{os.sep}"


def _written(outcome: Outcome, *, dry_run: bool) -> str:
    memory = "an unknown amount" if outcome.peak_bytes is None else size(outcome.peak_bytes)
    cost = (
        f"would read {size(outcome.bytes_read)} and take about {outcome.seconds:.1f} s and {memory} of memory"
        if dry_run
        else f"{outcome.unchanged_share or 0:.1%} of the values unchanged, in {outcome.seconds:.1f} s"
    )
    against = "" if outcome.decision.verdict == "forecast" else " although the verdict is against it"
    return (
        f"{'would write' if dry_run else 'wrote'} {outcome.path}{against}, {size(outcome.bytes_written)} by {outcome.method}:"
        f" {outcome.num_forecast} tensors forecast, {outcome.num_copied} copied; {cost}"
    )


def _expected(decision: Decision, purpose: Purpose) -> str:
    error = (
        f"expected error: {shown_number(decision.expected)} of the error without a forecast{_farther(decision, purpose)}"
        if math.isfinite(decision.expected)
        else decision.reason
    )
    direction = f"direction S = {shown_number(decision.coherence)}, {chance(decision.significance)}"
    return f"{error}; back-test b = {shown_number(decision.ratio)}; {direction}; {recent_half(decision.recent)}"


def _farther(decision: Decision, purpose: Purpose) -> str:
    """Why a forecast to resume from is written although its weights are farther from the later ones than the origin's."""
    if purpose == "resume" and decision.is_farther:
        return " (the weights are farther from the real ones at first; S and p decide whether to resume)"
    return ""


# --- verify ----------------------------------------------------------------------------------------------------------


def verify_note(result: VerifyAnswer) -> None:
    """That the snapshot cannot judge the forecast, or that the two are not of one step."""
    if result.descends:
        note(
            "caution: the snapshot seems to come from a run that resumed from this forecast, so it cannot show what the forecast"
            " was worth: compare with a run that continued without the forecast"
        )
    if result.forecast_step != result.truth_step:
        unit = "learning rate" if result.clock == "rate" else "steps"
        share = "" if result.trained is None else f"; training covered {result.trained:.2f} of the horizon, in {unit}"
        note(
            f"note: the steps differ: the forecast is for step {result.forecast_step}, the snapshot is of step {result.truth_step}{share}"
        )


def verify_table(result: VerifyAnswer, *, verbose: bool) -> None:
    console = stdout()
    rows = sorted(result.per_tensor, key=lambda t: -t.num_elements)
    shown = rows if verbose else rows[:MAX_ROWS]
    ratios = [math.nan if tensor.ratio is None else tensor.ratio for tensor in shown]
    columns = (
        Column("tensor", _texts(tensor.name for tensor in shown), least=LEAST_NAME),
        Column("values", _texts(f"{tensor.num_elements:,}" for tensor in shown), "right"),
        Column("ratio", _texts(f"{ratio:.2f}" if math.isfinite(ratio) else "-" for ratio in ratios), "right"),
        Column("", _bars(ratios), rank=1),
    )
    console.print(fitted_table(columns, console.width))
    if len(rows) > MAX_ROWS and not verbose:
        console.print(f"and {len(rows) - MAX_ROWS} smaller tensors (-v shows all)")
    if result.ratio is None:
        console.print("the real snapshot equals the reference: the weights did not move")
        return
    truth = "this snapshot, which descends from it," if result.descends else "the real snapshot"
    better = f"{1 - result.ratio:.0%} closer to {truth} than" if result.ratio < 1 else f"no closer to {truth} than"
    console.print(
        f"[bold]ratio {result.ratio:.3f}[/]: the forecast is {better} the snapshot that it was made from;"
        f" mean absolute error {result.mean_absolute_error:.3g}"
    )


# --- tune ------------------------------------------------------------------------------------------------------------


def tune_summary(tuning: Tuning) -> None:
    """What was done, for people; or why nothing was."""
    verdict, names = tuning.verdict, ", ".join(tuning.layers)
    for text in tuning.notes:
        note(f"note: {text}")
    if tuning.existed:
        note(f"{names}: already there, made from the same checkpoint in the same way: nothing was written")
        return
    if verdict is None:
        what = "covariance of its inputs" if tuning.method == "covariance" else "applied"
        note(f"{names}: {what}, {size(tuning.bytes_written)} written in {tuning.seconds:.1f} s")
        return
    if not verdict.is_accepted:
        note(f"no significant gain: {verdict.reason}: nothing written")
        note("hint: use more rows, or rows closer to the model's real inputs; --gate X lowers the required gain")
        return
    iterations = f"{tuning.iterations} iteration" + "s" * (tuning.iterations != 1)
    how = "closed form" if tuning.has_closed_form else f"{tuning.method}, {iterations}"
    note(
        f"{names}: {how} on all {tuning.num_rows} rows,"
        f" {tuning.num_passes} pass" + "es" * (tuning.num_passes != 1) + " over the weights"
    )
    changes = ", ".join(f"{share:.2g}" for share in tuning.sizes)
    note(
        f"{verdict.reason}; tuned rows {tuning.tuned_loss[0]:.4g} -> {tuning.tuned_loss[1]:.4g}; |W - W_0| / |W_0| = {changes}"
    )
    note(f"{size(tuning.bytes_written)} written, read back, and its losses recomputed in {tuning.seconds:.1f} s")
