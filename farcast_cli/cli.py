"""The command line: parse, one library call, render. Heavy imports wait for the commands that compute."""

from __future__ import annotations

import gc
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from farcast_cli import __version__
from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_SAMPLE, CountersMode, Io
from farcast_cli.commands import leap as leap_command
from farcast_cli.commands import streams
from farcast_cli.commands import tune as tune_command
from farcast_cli.commands.options import (
    ClockOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    DTypeOption,
    EvalTimeoutOption,
    ExcludeOption,
    ForecasterOption,
    FullOption,
    GradWeightOption,
    Grouped,
    IncludeOption,
    IoOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    LedgerOption,
    MaximizeOption,
    MethodOption,
    OptimizerOption,
    OverwriteOption,
    PatternOption,
    PurposeOption,
    QuietOption,
    SampleOption,
    ScopeOption,
    StepNormOption,
    StepsOption,
    ThreadsOption,
    VerboseOption,
    check_horizon_options,
    choice,
    device_name,
    env,
    parse_horizons,
    parse_size,
    prepare,
)
from farcast_cli.errors import FarcastError, MemoryUsedUpError, NoForecastError, OutputError, SnapshotError, UsageError

INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 done, 1 bug, 2 usage, 3 snapshots unusable, 4 unreadable or unsafe file, 5 output,"
    " 10 no forecast better than the last checkpoint, 130 interrupted."
)

app = typer.Typer(
    name="farcast",
    add_completion=False,
    rich_markup_mode="rich",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Forecast the weights of a training run from the checkpoints it left on disk.

Reads a folder of snapshots, learns how the weights move, and writes a checkpoint some steps ahead that training
resumes from. Your own checkpoints are never changed.

  farcast inspect ckpts/               what is there, and what would be forecast
  farcast fit ckpts/                   learn from it: writes ./forecaster.safetensors
  farcast backtest                     what a forecast would have been worth
  farcast predict                      write it, as far ahead as the evidence supports; prints its path
  farcast verify FORECAST --against CKPT   what it was worth, once training got there
  farcast leap ckpts/                  all of this in one command, with a memory: for a loop
  farcast tune CKPT --layer KEY --data FILE --loss mse   adapt one wide layer to a few hundred labelled rows

Point the trainer's resume option at the path that predict printed.""",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"farcast {__version__}\n")
    elif context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


@app.command(cls=Grouped, epilog="Example: farcast inspect ckpts/ --json | jq '.snapshots[].step'")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the run's checkpoints.")],
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,  # noqa: ARG001
    verbose: VerboseOption = False,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Show the snapshots with their steps and the evidence, and what will be forecast and what copied."""
    from farcast_cli.commands import render
    from farcast_cli.run.alignment import align, since_last_change
    from farcast_cli.run.steps import parse_steps
    from farcast_cli.run.thinning import thinned
    from farcast_cli.run.trajectory import MIN_SNAPSHOTS, survey

    trajectory = survey(directory, steps=parse_steps(steps), pattern=pattern or "")
    problems = [f"{error}; {error.hint}" for error in trajectory.conflicts]
    alignment, fatal = None, next(iter(trajectory.conflicts), None)
    chosen: Any = {"include": include or (), "exclude": exclude or ()}
    try:
        history, begins = since_last_change(trajectory.snapshots, minimum=MIN_SNAPSHOTS, **chosen)
        entering, left_out = thinned(history, **chosen)
        alignment = align(entering, **chosen)
        trajectory = replace(trajectory, notes=(*trajectory.notes, *filter(None, (begins, left_out))))
    except SnapshotError as error:
        fatal = error
        problems.append(f"{error}; {error.hint}" if error.hint else str(error))
    if len(trajectory.snapshots) < MIN_SNAPSHOTS:
        problems.append(f"{len(trajectory.snapshots)} snapshots: fit needs {MIN_SNAPSHOTS}")
    if json_:
        from farcast_cli.commands.answers import of_inspect

        render.as_json(of_inspect(trajectory, alignment, problems))
    else:
        render.inspect_table(trajectory, alignment, problems, verbose=verbose)
    if fatal:
        raise typer.Exit(fatal.exit_code)


@app.command(cls=Grouped, epilog="Example: farcast fit ckpts/ --steps 2000: && farcast predict --horizon 1000")
def fit(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds the run's checkpoints.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", envvar=env("FORECASTER"), metavar="FILE", help="The forecaster file to write.")
    ] = DEFAULT_FORECASTER,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    sample: SampleOption = DEFAULT_SAMPLE,
    full: FullOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Learn from a run: read a sample of every tensor at every snapshot and write the forecaster file."""
    from farcast_cli.commands import render
    from farcast_cli.files.place import check_outside

    check_outside(output, directory)
    started = time.monotonic()
    chosen = tuple(include or ()), tuple(exclude or ())
    fitted, bytes_read = _fit(
        _Reading(directory, *chosen, steps, pattern or "", None if full else sample, ledger, device, io, threads, quiet)
    )
    from farcast_cli.commands.answers import of_fit
    from farcast_cli.forecast.backtest import steadiness
    from farcast_cli.forecast.forecaster_file import save_fitted
    from farcast_cli.forecast.timeline import Timeline

    save_fitted(fitted, output)
    seconds = time.monotonic() - started
    steady = steadiness(fitted.judged()[0], Timeline(fitted.gram.steps, float(fitted.steps[-1])))
    if json_:
        render.as_json(of_fit(fitted, output, bytes_read=bytes_read, seconds=seconds, steady=steady))
    else:
        render.paths([output])
    if not quiet:
        render.fit_summary(fitted, bytes_read=bytes_read, seconds=seconds, steady=steady, verbose=verbose)


@app.command(cls=Grouped, epilog="Example: farcast backtest --horizon 500,1000,2000")
def backtest(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A run; the forecaster file's by default.")] = None,
    horizon: Annotated[
        str | None,
        typer.Option(envvar=env("HORIZON"), metavar="N[,N...]", help="Steps ahead; some shares of the history by default."),
    ] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    purpose: PurposeOption = "resume",
    method: MethodOption = None,
    clock: ClockOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    sample: SampleOption = DEFAULT_SAMPLE,
    full: FullOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Show what every method would have been worth inside the run's own history, and the verdict."""
    horizons = parse_horizons(horizon)
    prepare(device)
    from farcast_cli.commands import render
    from farcast_cli.commands.answers import of_backtest
    from farcast_cli.forecast.backtest import decide, score, steadiness
    from farcast_cli.forecast.choice import choose_method, usual_horizons
    from farcast_cli.forecast.forecaster import Task
    from farcast_cli.forecast.forecaster_file import load_fitted
    from farcast_cli.forecast.methods import METHODS
    from farcast_cli.forecast.timeline import Timeline

    if directory:
        patterns = tuple(include or ()), tuple(exclude or ())
        fitted, _ = _fit(
            _Reading(directory, *patterns, steps, pattern or "", None if full else sample, ledger, device, io, threads, quiet)
        )
    else:
        fitted = load_fitted(forecaster)
    timeline = Timeline(fitted.gram.steps, float(fitted.steps[-1]))
    gram, judged = fitted.judged()
    horizons = horizons or usual_horizons(timeline)
    pace = fitted.provenance.pace.clocked(clock, timeline.first, timeline.origin + max(horizons))
    anneals = purpose == "resume" and clock is None
    tasks = {
        h: Task(gram, judged, timeline, float(h), device=device_name(device), pace=pace, anneals=anneals) for h in horizons
    }
    chosen = {h: choose_method(method, task, purpose) for h, task in tasks.items()}
    decisions = {h: (chosen[h][0].name, decide(chosen[h][0], task, purpose)) for h, task in tasks.items()}
    shown = METHODS.values() if method in {None, "auto"} else {found.name: found for found, _ in chosen.values()}.values()
    scores = score(list(shown), tasks[horizons[0]], horizons)
    steady = steadiness(gram, timeline)
    if json_:
        render.as_json(of_backtest(fitted.steps[-1], steady, scores, decisions, pace))
    else:
        render.backtest_table(fitted.steps[-1], steady, scores, decisions)
        render.clock(pace)
        for why in dict.fromkeys(why for _, why in chosen.values() if why):
            render.note(f"auto: {why}")
        for known in METHODS.values() if verbose else ():
            render.note(f"{known.name}: {known.summary}")


@app.command(
    cls=Grouped,
    epilog="Examples: farcast predict --horizon 1000   |   farcast predict --horizon 500,1000,2000 -o leaps/   |   "
    "farcast predict --to-step 20000 --eval-cmd 'python eval.py {ckpt}'",
)
def predict(
    horizon: Annotated[
        str | None,
        typer.Option(
            envvar=env("HORIZON"),
            metavar="N[,N...]",
            help="Steps ahead; several are written in one pass. What the evidence supports by default.",
        ),
    ] = None,
    to_step: Annotated[int | None, typer.Option(envvar=env("TO_STEP"), metavar="N", help="The step to forecast.")] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            envvar=env("OUTPUT"),
            metavar="OUT",
            help="The checkpoint to write; a folder for them where it ends in / or there are several horizons."
            " forecasts/NAME by default.",
        ),
    ] = None,
    purpose: PurposeOption = "resume",
    method: MethodOption = None,
    step_norm: StepNormOption = None,
    scale: Annotated[float, typer.Option(envvar=env("SCALE"), help="Multiplies the step.")] = 1.0,
    scope: ScopeOption = "auto",
    clock: ClockOption = None,
    grad_weight: GradWeightOption = 0.0,
    origin: Annotated[
        int | None,
        typer.Option(envvar=env("ORIGIN"), metavar="STEP", help="Forecast from this snapshot; the last by default."),
    ] = None,
    optimizer: OptimizerOption = "copy",
    counters: Annotated[
        CountersMode,
        choice(CountersMode, "--counters", text="Move the trainer's counters and schedule, or leap the weights alone."),
    ] = "advance",
    dtype: DTypeOption = "source",
    layout: LayoutOption = "same",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            envvar=env("MAX_SHARD_SIZE"),
            metavar="SIZE",
            help="Shard the output anew, as in 5GB; the source's shards by default.",
        ),
    ] = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option(
            envvar=env("EVAL_CMD"),
            metavar="'CMD {ckpt}'",
            help="Judge the origin, which is your own last snapshot, and the forecast by the last number that this prints; it must"
            " not change them. Only what is better is published.",
        ),
    ] = None,
    maximize: MaximizeOption = False,
    jobs: JobsOption = 1,
    eval_timeout: EvalTimeoutOption = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", envvar=env("EVEN_IF_WORSE"), help="Write it whatever the verdict.")
    ] = False,
    overwrite: OverwriteOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Write the forecast checkpoint, if the run's own history supports it; print its path on stdout."""
    check_horizon_options(horizon, to_step)
    num_threads = prepare(device, threads)
    from farcast_cli.commands import render
    from farcast_cli.commands.answers import of_predict
    from farcast_cli.evaluation.judge import Evaluator
    from farcast_cli.forecast.forecaster import Options
    from farcast_cli.forecast.forecaster_file import load_fitted
    from farcast_cli.predict import default_notes
    from farcast_cli.predict import predict as run
    from farcast_cli.request import Request

    options = Options(step_norm, scale, scope, grad_weight)
    fitted = load_fitted(forecaster)
    start = fitted.steps[-1] if origin is None else origin
    request = Request(
        horizons=parse_horizons(horizon) if to_step is None else (to_step - start,),
        purpose=purpose,
        method=method,
        options=options,
        origin_step=origin,
        optimizer=optimizer,
        counters=counters,
        dtype=dtype,
        layout=layout,
        max_shard_bytes=parse_size(max_shard_size),
        output=output,
        even_if_worse=even_if_worse,
        overwrite=overwrite,
        dry_run=dry_run,
        ledger=ledger,
        clock=clock,
        device=device_name(device),
        io=io,
        num_threads=num_threads,
        evaluator=Evaluator(eval_cmd, maximize, jobs, eval_timeout) if eval_cmd else None,
    )
    with render.progress(quiet=quiet) as progress:
        outcomes = run(fitted, request, progress)
    written = [outcome.path for outcome in outcomes if outcome.path]
    if not quiet:
        for outcome in outcomes:
            render.outcome_summary(outcome, dry_run=dry_run, verbose=verbose)
        for text in default_notes(fitted, request, outcomes):
            render.note(f"note: {text}")
    if json_:
        render.as_json(of_predict(outcomes, dry_run=dry_run))
    elif not dry_run:
        render.paths(written)
    if not written:
        hint = "keep training and fit again, try another --horizon, or write it all the same with --even-if-worse"
        render.note(f"hint: {hint}", quiet=quiet)
        raise typer.Exit(NoForecastError.exit_code)


@app.command(cls=Grouped, epilog="Example: farcast verify forecasts/checkpoint-1500 --against ckpts/checkpoint-1500")
def verify(
    forecast: Annotated[Path, typer.Argument(metavar="FORECAST", help="What predict wrote.")],
    against: Annotated[Path, typer.Option(envvar=env("AGAINST"), metavar="CKPT", help="The run's own snapshot of that step.")],
    reference: Annotated[
        Path | None,
        typer.Option(envvar=env("REFERENCE"), metavar="CKPT", help="What to compare with; the forecast's origin by default."),
    ] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Say what a forecast was worth, once training has reached its step."""
    prepare("cpu")
    from farcast_cli.commands import render
    from farcast_cli.verify import find_reference
    from farcast_cli.verify import verify as run

    with render.progress(quiet=quiet) as progress:
        result = run(forecast, against, reference or find_reference(forecast), progress=progress)
    if result.forecast_step != result.truth_step:
        steps = f"step {result.forecast_step} with step {result.truth_step}"
        unit = "learning rate" if result.clock == "rate" else "steps"
        share = "" if result.trained is None else f": trained was {result.trained:.2f} of its stretch, in {unit}"
        render.note(f"note: this compares a forecast for {steps}{share}", quiet=quiet)
    if json_:
        render.as_json(result)
    else:
        render.verify_table(result, verbose=verbose)


app.command(cls=Grouped, epilog=leap_command.EXAMPLES)(leap_command.leap)
app.command(cls=Grouped, epilog=tune_command.EXAMPLES)(tune_command.tune)


@app.command(cls=Grouped, epilog="Example: farcast schema predict > predict.schema.json")
def schema(
    command: Annotated[
        str | None, typer.Argument(metavar="[COMMAND]", help="A command, or sidecar; an object of all of them by default.")
    ] = None,
    config: ConfigOption = None,  # noqa: ARG001
) -> None:
    """Print the JSON schema of what a command answers with --json, or of a sidecar."""
    from farcast_cli import results
    from farcast_cli.commands import render

    if command is not None and command not in results.ANSWERS:
        raise UsageError(f"{command}: expected one of {', '.join(results.ANSWERS)}", hint="farcast schema --help")
    render.schema(results.schema(command) if command else {name: results.schema(name) for name in results.ANSWERS})


# --- parsing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Reading:
    """How `fit`, and `backtest` of a folder, read a run."""

    directory: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    steps: str | None
    pattern: str
    num_samples: int | None
    ledger: Path
    device: str
    io: Io
    threads: int
    quiet: bool


def _fit(reading: _Reading) -> tuple[Any, int]:
    """The fitted forecaster and the bytes that were read for it."""
    from farcast_cli.run.steps import parse_steps
    from farcast_cli.run.trajectory import MIN_SNAPSHOTS, discover

    wanted = parse_steps(reading.steps)
    trajectory = discover(reading.directory, steps=wanted, pattern=reading.pattern, minimum=MIN_SNAPSHOTS)
    num_workers = prepare(reading.device, reading.threads)
    from farcast_cli.commands import render
    from farcast_cli.engine.reader import Resources
    from farcast_cli.forecast.accumulate import bytes_to_sample
    from farcast_cli.forecast.fitting import fit as run
    from farcast_cli.forecast.ledger import History, read_leaps, since_last_leap
    from farcast_cli.run.alignment import since_last_change
    from farcast_cli.run.thinning import thinned

    leaps = read_leaps(reading.ledger, trajectory.directory)
    history = History(trajectory, None, 0) if wanted else since_last_leap(trajectory, leaps, minimum=MIN_SNAPSHOTS)
    chosen: Any = {"include": reading.include, "exclude": reading.exclude}
    snapshots, begins = since_last_change(history.trajectory.snapshots, minimum=MIN_SNAPSHOTS, **chosen)
    render.fit_cautions(trajectory, history, leaps if wanted else (), begins, quiet=reading.quiet)
    snapshots, left_out = thinned(snapshots, **chosen)
    if left_out:
        render.note(left_out, quiet=reading.quiet)
    notes = (*trajectory.notes, *filter(None, (begins, left_out)))
    trajectory = replace(history.trajectory, snapshots=snapshots, notes=notes)
    done = []
    with render.progress(quiet=reading.quiet) as progress:
        told = progress("fit", bytes_to_sample(trajectory.snapshots, reading.num_samples))

        def count(num_bytes: int) -> None:
            done.append(num_bytes)
            told(num_bytes)

        fitted = run(
            trajectory,
            **chosen,
            leap=history.leap,
            num_samples=reading.num_samples,
            resources=Resources(device_name(reading.device), reading.io, num_workers),
            progress=count,
        )
    return fitted, sum(done)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


_ParsingError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What typer raises for a command line that it cannot parse; newer versions bring a click of their own."""


def main() -> NoReturn:
    """The console script: every error becomes one line, a hint and an exit code."""
    streams.take_over()
    gc.disable()  # a command is over before cycles matter, and looking for them among 100,000 tensors takes its time
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it, and so do we then
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # newer versions of typer turn an interrupt into this code
            raise KeyboardInterrupt  # noqa: TRY301
        _check_printed(code or 0)
        sys.exit(code or 0)
    except FarcastError as error:
        _fail(error)
    except (OSError, RuntimeError, UnicodeEncodeError, MemoryError) as error:
        told = _of_the_system(error)
        if told is None:
            raise
        _fail(told)
    except _ParsingError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "farcast"
        _fail(UsageError(error.format_message(), hint=f"{command} --help"))
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted: what was not complete has been removed\n")
        sys.exit(INTERRUPTED)
    finally:
        gc.enable()


def _check_printed(code: int) -> None:
    """That the result of a command that ended well is on stdout.

    Raises:
        OutputError: a part of it is not.
    """
    problem = streams.lost()
    if problem is not None and code in {0, NoForecastError.exit_code}:
        raise OutputError(
            f"stdout: the result cannot be printed: {problem.strerror}",
            hint="the files that the command wrote are whole and in their places: only what it prints is lost",
        )


def _of_the_system(error: Exception) -> FarcastError | None:
    """What the system fails at where no module has said so better; None for a bug."""
    from farcast_cli.files.reading import unreadable

    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's, of a GPU
        return MemoryUsedUpError("the memory does not suffice", hint="--threads 1 takes the least; --device cpu uses no GPU's")
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"a name cannot be spelled in this locale: {error}", hint="LC_ALL=C.UTF-8")
    cause = error.__context__ if isinstance(error, RuntimeError) else error  # pathlib's, for a link that leads to itself
    return unreadable(Path("an input"), cause) if isinstance(cause, OSError) else None


def _fail(error: FarcastError) -> NoReturn:
    try:
        from farcast_cli.commands import render

        render.error(error)
    except MemoryError:
        streams.say(f"error: {error}")
    sys.exit(error.exit_code)
