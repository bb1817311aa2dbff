"""The Python API: each function is one command, with the command's options as keywords; the commands call it themselves.

    import farcast_cli

    fitted = farcast_cli.fit("ckpts")
    done = farcast_cli.predict(fitted, horizon=500)
    print(done.path or done.reason)

Nothing is printed. `progress` (farcast_cli.progress.Progress) is told how far the work is. Whatever a caller can cause is a
FarcastError with `exit_code` and `hint`; its text names the option, as on the command line.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.choices import (
    DEFAULT_FORECASTER,
    DEFAULT_INTERVAL,
    DEFAULT_LEDGER,
    DEFAULT_RANKS_TIMEOUT,
    DEFAULT_SAMPLE,
    ClockName,
    CountersMode,
    Io,
    KeepForm,
    OptimizerMode,
    OutputDType,
    OutputLayout,
    Purpose,
    Ranks,
    Scope,
    StepFrom,
    StepNorm,
    StepUnit,
)
from farcast_cli.horizons import in_steps, parse_horizons, text_of
from farcast_cli.log_to import check_apart, log_answer, logged_events, parse_targets, places_of
from farcast_cli.progress import silent
from farcast_cli.returned import Prediction, Report
from farcast_cli.settings import (
    check_choice,
    check_choices,
    check_layout,
    check_leap_options,
    check_watch_options,
    evaluator_of,
    fit_request,
    here,
    horizons_of,
    ledgers_of,
    parse_size,
    place_in_folder,
    prepare,
    resources_of,
    selection_of,
    source_of,
    team_of,
    watch_request,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from farcast_cli.forecast.fitting import FitOutcome
    from farcast_cli.forecast.forecaster_file import Fitted
    from farcast_cli.forecast.judgement import BacktestReport
    from farcast_cli.keeping import Keeping
    from farcast_cli.leaps.ask import Leapt
    from farcast_cli.progress import Progress
    from farcast_cli.request import Outcome
    from farcast_cli.results import VerifyAnswer
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.watching import Event

    Place = str | os.PathLike[str]
    Run = Place | FitOutcome | Fitted
    """What `fit` returned, a forecaster file, or the folder of a run, which is then fitted in memory."""
    Horizon = int | str | Sequence[int | str]
    """Steps ahead, or a text as on the command line: "1k", "20%"; or several."""


def open_run(
    directory: Place,
    *,
    steps: str | None = None,
    pattern: str | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
) -> Trajectory:
    """Find the snapshots of a run and read their headers; no tensor is read.

    Returns:
        The trajectory: `snapshots` in the order of their `steps`, each with `path`, `step` and `num_bytes`; the `layout`; what
        was `ignored`; `notes` for a person.

    Raises:
        SnapshotError: no snapshot, or steps that contradict each other.
        FileFormatError: a snapshot that cannot be read.
    """
    prepare("cpu")
    from farcast_cli.run.trajectory import discover

    chosen = selection_of(Path(directory), None, None, steps, pattern, step_from=step_from, unit=unit, weights=weights)
    return discover(chosen.directory, **chosen.entries)


def fit(
    directory: Place,
    *,
    output: Place | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    steps: str | None = None,
    pattern: str | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
    sample: int = DEFAULT_SAMPLE,
    full: bool = False,
    ledger: Place = DEFAULT_LEDGER,
    device: str = "auto",
    io: Io = "auto",
    threads: int = 0,
    losses: Place | None = None,
    history: Place | None = None,
    log_to: Sequence[str] | None = None,
    progress: Progress = silent,
) -> FitOutcome:
    """Read a sample of every tensor at every snapshot.

    Args:
        output: the forecaster file to write; unlike the command, none by default.
        sample: values of each tensor, 1000 or more.
        losses: the run's log of losses; by default where its trainer keeps it.
        history: the folder of kept snapshots; by default kept/NAME, if it has those of this run.
        log_to: places to log the numbers to, such as "jsonl:PATH"; `unlogged` of the result says which failed.

    Returns:
        The outcome: `fitted`, the forecaster; `steady`, with the coherence S in -1..1 and its significance; `cautions`.

    Raises:
        SnapshotError: fewer than six snapshots, or not those of one run.
        FileFormatError, OutputError: a file cannot be read or written.
    """
    check_choice("--io", io, Io)
    targets = parse_targets(log_to, Path(directory))
    request = fit_request(
        Path(directory),
        output=None if output is None else Path(output),
        include=include,
        exclude=exclude,
        steps=steps,
        pattern=pattern,
        step_from=step_from,
        unit=unit,
        weights=weights,
        sample=sample,
        full=full,
        ledger=Path(ledger),
        device=device,
        io=io,
        threads=threads,
        losses=None if losses is None else Path(losses),
        history=None if history is None else Path(history),
    )
    from farcast_cli.answers import of_fit
    from farcast_cli.forecast.fitting import fit_planned, plan_fit

    done = fit_planned(plan_fit(request), progress)
    return replace(done, unlogged=log_answer(targets, "fit", of_fit(done, request.output), request.selection.directory))


def keep(
    directory: Place,
    *,
    into: Place | None = None,
    sampled: bool = False,
    last: int | None = None,
    steps: str | None = None,
    pattern: str | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
    progress: Progress = silent,
) -> Keeping:
    """Copy the weights of checkpoints that are not kept yet, before the trainer deletes them.

    Args:
        into: the folder; by default kept/NAME.
        sampled: keep only the values that `fit` reads; `predict` needs all values of the snapshots that its method reads.
        last: how many kept snapshots stay; None for all.

    Returns:
        What was done: `added` and `removed` files, all kept `snapshots`, `num_bytes` and `whole_bytes`, `cautions`.

    Raises:
        SnapshotError: no snapshot, or a kept one that has other weights at its step.
        FileFormatError, OutputError: a file cannot be read or written.
    """
    prepare("cpu")
    from farcast_cli.keeping import KeepRequest
    from farcast_cli.keeping import keep as copy

    selection = selection_of(Path(directory), None, None, steps, pattern, step_from=step_from, unit=unit, weights=weights)
    return copy(KeepRequest(selection, None if into is None else Path(into), last, sampled), progress)


def backtest(
    run: Run = DEFAULT_FORECASTER,
    *,
    horizon: Horizon | None = None,
    purpose: Purpose = "resume",
    method: str | None = None,
    clock: ClockName | None = None,
    device: str = "auto",
) -> BacktestReport:
    """Test every method inside the run's own history, and judge each horizon.

    Returns:
        The report: `scores`, with the ratio of each method at each horizon (0 is perfect, 1 no better than no forecast);
        `decisions`, by horizon the method and its decision with `verdict` and `reason`; `steady`, as `fit` has it.

    Raises:
        UsageError: no such method, or a horizon that cannot be.
        SnapshotError, FileFormatError: the run or the forecaster file cannot be used.
    """
    horizons = parse_horizons(text_of(horizon))
    check_choice("--for", purpose, Purpose)
    check_choice("--clock", clock, ClockName)
    fitted = _fitted(run, device, "auto", 0)
    from farcast_cli.forecast.judgement import report_backtest
    from farcast_cli.prediction import within_run
    from farcast_cli.settings import device_name

    where = device_name(device)
    found = report_backtest(fitted, in_steps(horizons, fitted), method=method, purpose=purpose, clock=clock, device=where)
    return within_run(found, fitted) if purpose == "resume" else found


def report(
    run: Run = DEFAULT_FORECASTER,
    *,
    output: Place | None = None,
    overwrite: bool = False,
    purpose: Purpose = "resume",
    ledger: Place = DEFAULT_LEDGER,
    losses: Place | None = None,
    device: str = "auto",
    io: Io = "auto",
    threads: int = 0,
) -> Report:
    """Tell the verdict on a run and its evidence.

    Args:
        output: a file that ends in .html, .png or .md; unlike the command, none by default.
        losses: the run's log of losses; by default where its trainer keeps it.

    Returns:
        The report: `story` has all numbers; `markdown()` and `text()` tell it.

    Raises:
        UsageError: no such form, or its package is missing.
        SnapshotError, FileFormatError: the run or the forecaster file cannot be used.
        OutputError: the file cannot be written, or is not a report.
    """
    check_choice("--for", purpose, Purpose)
    check_choice("--io", io, Io)
    resources = resources_of(device, io, threads)
    from farcast_cli.reports.output import check_form, check_output, write_report
    from farcast_cli.reports.story import course_of, tell
    from farcast_cli.request import Request

    place = None if output is None else Path(output)
    check_form(place)
    fitted = _fitted(run, device, io, threads)
    check_output(place, fitted.directory, overwrite=overwrite)
    course = course_of(fitted, losses=None if losses is None else Path(losses), ledgers=ledgers_of(Path(ledger)))
    story = tell(fitted, Request(purpose=purpose, source=source_of(run, fitted), resources=resources), course)
    write_report(story, place, overwrite=overwrite)
    return Report(story, place)


def predict(
    run: Run = DEFAULT_FORECASTER,
    *,
    horizon: Horizon | None = None,
    to_step: int | None = None,
    output: Place | None = None,
    place: str | None = None,
    purpose: Purpose = "resume",
    method: str | None = None,
    step_norm: StepNorm | None = None,
    scale: float = 1.0,
    scope: Scope = "auto",
    clock: ClockName | None = None,
    grad_weight: float = 0.0,
    origin: int | None = None,
    optimizer: OptimizerMode = "copy",
    counters: CountersMode = "advance",
    dtype: OutputDType = "source",
    layout: OutputLayout = "same",
    max_shard_size: str | None = None,
    eval_cmd: str | None = None,
    maximize: bool = False,
    jobs: int = 1,
    eval_timeout: float | None = None,
    even_if_worse: bool = False,
    overwrite: bool = False,
    ledger: Place = DEFAULT_LEDGER,
    dry_run: bool = False,
    device: str = "auto",
    io: Io = "auto",
    threads: int = 0,
    ranks: Ranks = "off",
    ranks_timeout: float = DEFAULT_RANKS_TIMEOUT,
    log_to: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Prediction:
    """Write the forecast checkpoint if the run's own history supports it.

    Args:
        horizon: steps after the origin; chosen by evidence if neither it nor `to_step` is given.
        output: path of the checkpoint; a text that ends in "/" names a folder for it. Default: forecasts/NAME.
        place: the name of the checkpoint's file, for a trainer that resumes from a folder; the checkpoint is then a folder.
        log_to: as for `fit`; a dry run logs nothing.
        ranks: "env" shares the work among a launcher's processes, which all call this; rank 0 publishes and logs.
        ranks_timeout: seconds that a rank waits for another that says nothing.

    Returns:
        The prediction: its `path` is None if the verdict is against a forecast (exit code 10 of the command). That is an
        answer and no error.

    Raises:
        UsageError: options that make no sense.
        SnapshotError, FileFormatError, OutputError: nothing was written.
    """
    horizons, shard_bytes = horizons_of(text_of(horizon), to_step), parse_size(max_shard_size)
    check_choices(clock=clock, optimizer=optimizer, counters=counters, layout=layout, io=io)
    check_layout(layout, purpose)
    inner = place_in_folder(place)
    targets = parse_targets(log_to)
    for name, value, allowed in (("--for", purpose, Purpose), ("--step-norm", step_norm, StepNorm), ("--scope", scope, Scope)):
        check_choice(name, value, allowed)
    check_choice("--dtype", dtype, OutputDType)
    evaluator = evaluator_of(eval_cmd, maximize=maximize, jobs=jobs, timeout_s=eval_timeout)
    team = team_of(ranks, ranks_timeout, eval_cmd=eval_cmd)
    resources = resources_of(device, io, threads)
    fitted = _fitted(run, device, io, threads)
    check_apart(targets, fitted.directory)
    from farcast_cli.answers import of_predict
    from farcast_cli.forecast.forecaster import Options
    from farcast_cli.prediction import predict as forecast
    from farcast_cli.request import Request

    request = Request(
        horizons=in_steps(horizons, fitted, origin=origin),
        to_step=to_step,
        purpose=purpose,
        method=method,
        options=Options(step_norm, scale, scope, grad_weight),
        origin_step=origin,
        optimizer=optimizer,
        counters=counters,
        dtype=dtype,
        layout=layout,
        max_shard_bytes=shard_bytes,
        output=None if output is None else os.fspath(output),
        place=inner,
        even_if_worse=even_if_worse,
        overwrite=overwrite,
        dry_run=dry_run,
        ledgers=ledgers_of(Path(ledger)),
        clock=clock,
        logs=places_of(targets),
        source=source_of(run, fitted),
        narrowed=fitted.repeated + (" --history KEPT" if fitted.kept else ""),
        resources=resources,
        team=team,
        evaluator=evaluator,
    )
    outcomes = tuple(forecast(fitted, request, progress))
    answer = of_predict(outcomes, dry_run=dry_run)
    unlogged = () if dry_run or not team.leads else log_answer(targets, "predict", answer, fitted.directory)
    return Prediction(fitted, request, outcomes, unlogged)


def leap(
    directory: Place,
    *,
    every: int | None = None,
    eval_cmd: str | None = None,
    maximize: bool = False,
    jobs: int = 1,
    eval_timeout: float | None = None,
    gain: float | None = None,
    max_gain: float | None = None,
    output: Place | None = None,
    place: str | None = None,
    counters: CountersMode = "keep",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    steps: str | None = None,
    pattern: str | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
    clock: ClockName | None = None,
    optimizer: OptimizerMode = "copy",
    layout: OutputLayout = "same",
    even_if_worse: bool = False,
    overwrite: bool = False,
    ledger: Place = DEFAULT_LEDGER,
    dry_run: bool = False,
    device: str = "auto",
    io: Io = "auto",
    threads: int = 0,
    losses: Place | None = None,
    log_to: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Leapt:
    """Leap from the newest checkpoint of a run, with a memory, for a loop.

    Args:
        log_to: as for `fit`; a dry run logs nothing.

    Returns:
        The call's result: `outcome.path` is the checkpoint to resume from; None means: go on from `origin`, the run's newest
        checkpoint, for the reason in `outcome.decision.reason`.

    Raises:
        UsageError: options that make no sense.
        SnapshotError, FileFormatError, OutputError: nothing was written.
    """
    evaluator = evaluator_of(eval_cmd, maximize=maximize, jobs=jobs, timeout_s=eval_timeout)
    check_choices(clock=clock, optimizer=optimizer, counters=counters, layout=layout, io=io)
    check_layout(layout, "resume")
    targets = parse_targets(log_to, Path(directory))
    where, inner = None if output is None else os.fspath(output), place_in_folder(place)
    resources = resources_of(device, io, threads)
    check_leap_options(every=every, gain=gain, max_gain=max_gain, output=where)
    from farcast_cli.answers import of_leap
    from farcast_cli.leaps.ask import Ask
    from farcast_cli.leaps.call import leap as call
    from farcast_cli.request import Request

    request = Request(
        optimizer=optimizer,
        counters=counters,
        layout=layout,
        output=where,
        place=inner,
        even_if_worse=even_if_worse,
        overwrite=overwrite,
        dry_run=dry_run,
        ledgers=ledgers_of(Path(ledger)),
        clock=clock,
        logs=places_of(targets),
        resources=resources,
        evaluator=evaluator,
    )
    selection = selection_of(Path(directory), include, exclude, steps, pattern, step_from=step_from, unit=unit, weights=weights)
    done = call(Ask(request, selection, every, gain, max_gain, None if losses is None else Path(losses)), progress)
    answer = of_leap(done, dry_run=dry_run)
    return done if dry_run else replace(done, unlogged=log_answer(targets, "leap", answer, Path(directory)))


def watch(
    directory: Place,
    *,
    interval: float = DEFAULT_INTERVAL,
    until: int | None = None,
    once: bool = False,
    keep: KeepForm = "sampled",
    into: Place | None = None,
    leap: bool = False,
    on_leap: str | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    pattern: str | None = None,
    step_from: StepFrom | None = None,
    unit: StepUnit = "step",
    weights: str | None = None,
    ledger: Place = DEFAULT_LEDGER,
    device: str = "auto",
    io: Io = "auto",
    threads: int = 0,
    log_to: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Generator[Event, None, None]:
    """Follow a run while it trains: keep and judge each new snapshot, and leap if asked to.

    Args:
        interval: seconds between two looks at the folder.
        until: the step at which the watch ends; it ends with the run, too.
        once: judge what is there and end.
        keep: what is kept of each snapshot: "sampled", the values that `fit` reads, or all "weights".
        into: the folder for kept snapshots; by default kept/NAME.
        leap: write the forecast, as `predict` does, once for each origin whose verdict supports it.
        on_leap: a command that runs after that, with {ckpt} in place of the path.
        log_to: as for `fit`, for each verdict.

    Returns:
        What happens, as it happens; see `farcast_cli.watching`. Each look ends with a `Waiting`. Closing the iterator ends the
        command that runs.

    Raises:
        UsageError, OutputError: options that make no sense. Later problems are events, but for `once`.
    """
    targets, run = parse_targets(log_to), Path(directory)
    check_apart(targets, run)
    options: Any = {"include": include, "exclude": exclude, "pattern": pattern, "step_from": step_from, "unit": unit}
    options |= {"weights": weights, "ledger": Path(ledger), "device": device}
    request = watch_request(run, None if into is None else Path(into), **options, io=io, threads=threads, keep=keep)
    check_watch_options(interval, is_leaping=leap, on_leap=on_leap)
    from farcast_cli.evaluation.hook import Hook
    from farcast_cli.watching import watch as follow

    def write(fitted: Fitted, told: Progress) -> Outcome:
        return predict(fitted, ledger=ledger, device=device, io=io, threads=threads, progress=told).outcomes[0]

    command, write_or_not = Hook(on_leap) if on_leap else None, write if leap else None
    asked = replace(request, interval_s=interval, until=until, once=once, leap=write_or_not, hook=command)
    return logged_events(follow(asked, progress), targets, run)


def verify(forecast: Place, *, against: Place, reference: Place | None = None, progress: Progress = silent) -> VerifyAnswer:
    """Compare a forecast with the real snapshot, when training has reached its step.

    Args:
        reference: the snapshot that the error is measured against; by default the forecast's origin, by its sidecar.

    Returns:
        The answer: `ratio` (0 is perfect, 1 no better than no forecast; None if the weights did not move) and `per_tensor`.

    Raises:
        UsageError: no sidecar, and no reference.
        SnapshotError, FileFormatError: the three cannot be compared.
    """
    prepare("cpu")
    from farcast_cli.verification import find_reference
    from farcast_cli.verification import verify as compare

    start = find_reference(Path(forecast)) if reference is None else Path(reference)
    return compare(Path(forecast), Path(against), start, progress=progress)


def _fitted(run: Run, device: str, io: Io, threads: int) -> Fitted:
    """The forecaster of a run."""
    prepare(device, threads)
    from farcast_cli.forecast.fitting import FitOutcome
    from farcast_cli.forecast.forecaster_file import Fitted, load_fitted

    if isinstance(run, FitOutcome):
        return run.fitted
    if isinstance(run, Fitted):
        return run
    if (place := here(run)).is_dir():
        return fit(place, device=device, io=io, threads=threads).fitted
    return load_fitted(place)
