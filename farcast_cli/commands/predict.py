"""The command `predict`: parse, one library call, render."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farcast_cli import api
from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_RANKS_TIMEOUT, DEFAULT_SAMPLE, CountersMode
from farcast_cli.commands.fit import fitted_by
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
    HistoryOption,
    IncludeOption,
    IoOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    LedgerOption,
    LogToOption,
    MaximizeOption,
    MethodOption,
    OptimizerOption,
    OverwriteOption,
    PatternOption,
    PlaceOption,
    PurposeOption,
    QuietOption,
    RanksOption,
    RanksTimeoutOption,
    SampleOption,
    ScopeOption,
    StepFromOption,
    StepNormOption,
    StepsOption,
    ThreadsOption,
    UnitOption,
    VerboseOption,
    WeightsOption,
    choice,
)
from farcast_cli.errors import NoForecastError, TakenError, UsageError, shell_word
from farcast_cli.log_to import parse_targets
from farcast_cli.settings import check_layout, env, horizons_of, place_in_folder, seat_of, unshared_hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farcast_cli.choices import Ranks
    from farcast_cli.returned import Prediction

CHOOSING = ("include", "exclude", "steps", "pattern", "step_from", "unit", "weights", "history", "sample", "full")
"""The options that choose what is read of a folder; a forecaster file has read it already."""
EXAMPLES = (
    "Examples: farcast predict --horizon 1000   |   farcast predict ckpts/   |   farcast predict --horizon 500,1000,2000 -o leaps/   |   "
    "farcast predict --to-step 20000 --eval-cmd 'python eval.py {ckpt}'"
)


def predict(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="Folder with the run's checkpoints, to fit in memory; by default the forecaster file is read."
        ),
    ] = None,
    horizon: Annotated[
        str | None,
        typer.Option(
            envvar=env("HORIZON"),
            metavar="N[,N...]",
            help="Steps ahead, such as 500, 1k or 20% (of the history). Several are written in one pass. By default farcast chooses it by evidence.",
        ),
    ] = None,
    to_step: Annotated[
        int | None, typer.Option(envvar=env("TO_STEP"), metavar="N", help="Step to forecast, instead of --horizon.")
    ] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            envvar=env("OUTPUT"),
            metavar="OUT",
            help="Path of the checkpoint; if it ends in / or there are several horizons, a folder for the checkpoints."
            " Default: forecasts/RUN/NAME, where RUN is the name of the run's folder.",
        ),
    ] = None,
    place: PlaceOption = None,
    purpose: PurposeOption = "resume",
    method: MethodOption = None,
    step_norm: StepNormOption = None,
    scale: Annotated[float, typer.Option(envvar=env("SCALE"), help="Factor on the update.")] = 1.0,
    scope: ScopeOption = "auto",
    clock: ClockOption = None,
    grad_weight: GradWeightOption = 0.0,
    origin: Annotated[
        int | None,
        typer.Option(envvar=env("ORIGIN"), metavar="STEP", help="Step of the snapshot to forecast from; by default the last."),
    ] = None,
    optimizer: OptimizerOption = "copy",
    counters: Annotated[
        CountersMode,
        choice(CountersMode, "--counters", text="advance the trainer's counters and schedule with the weights, or keep them."),
    ] = "advance",
    dtype: DTypeOption = "source",
    layout: LayoutOption = "same",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            envvar=env("MAX_SHARD_SIZE"),
            metavar="SIZE",
            help="Largest size of a shard, such as 5GB; by default the run's own shards.",
        ),
    ] = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option(
            envvar=env("EVAL_CMD"),
            metavar="'CMD {ckpt}'",
            help="Command that scores a checkpoint: farcast reads the last number that it prints. It runs on your last snapshot and on"
            " the forecast, and must not change them. The forecast is published only if its score is better.",
        ),
    ] = None,
    maximize: MaximizeOption = False,
    jobs: JobsOption = 1,
    eval_timeout: EvalTimeoutOption = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", envvar=env("EVEN_IF_WORSE"), help="Write the forecast whatever the verdict.")
    ] = False,
    overwrite: OverwriteOption = False,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    step_from: StepFromOption = None,
    unit: UnitOption = "step",
    weights: WeightsOption = None,
    history: HistoryOption = None,
    sample: SampleOption = DEFAULT_SAMPLE,
    full: FullOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    log_to: LogToOption = None,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    ranks: RanksOption = "off",
    ranks_timeout: RanksTimeoutOption = DEFAULT_RANKS_TIMEOUT,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Write the forecast checkpoint if the run's own history supports it; print its path on stdout."""
    seat = seat_of(ranks)
    if seat.rank:
        context.obj.rank, quiet = seat.rank, True
    if full and directory and seat.count > 1:
        raise UsageError(
            "--full: expected a forecaster file, found --ranks env, with which every rank would read the whole run",
            hint=f"farcast fit {shell_word(directory)} --full --ranks env, then farcast predict --ranks env",
        )
    horizons_of(horizon, to_step)  # what cannot be is refused before the folder is read
    check_layout(layout, purpose)
    place_in_folder(place)
    parse_targets(log_to)
    from farcast_cli.commands import render

    run = fitted_by(
        directory,
        forecaster,
        context=context,
        needs=CHOOSING,
        quiet=quiet,
        include=include,
        exclude=exclude,
        steps=steps,
        pattern=pattern,
        step_from=step_from,
        unit=unit,
        weights=weights,
        history=history,
        sample=sample,
        full=full,
        ledger=ledger,
        device=device,
        io=io,
        threads=threads,
    )
    with render.progress(quiet=quiet) as progress, _unshared(ranks):
        done = api.predict(
            run,
            horizon=horizon,
            to_step=to_step,
            output=output,
            place=place,
            purpose=purpose,
            method=method,
            step_norm=step_norm,
            scale=scale,
            scope=scope,
            clock=clock,
            grad_weight=grad_weight,
            origin=origin,
            optimizer=optimizer,
            counters=counters,
            dtype=dtype,
            layout=layout,
            max_shard_size=max_shard_size,
            eval_cmd=eval_cmd,
            maximize=maximize,
            jobs=jobs,
            eval_timeout=eval_timeout,
            even_if_worse=even_if_worse,
            overwrite=overwrite,
            ledger=ledger,
            log_to=log_to,
            dry_run=dry_run,
            device=device,
            io=io,
            threads=threads,
            ranks=ranks,
            ranks_timeout=ranks_timeout,
            progress=progress,
        )
    if not seat.rank:
        _tell(done, quiet=quiet, verbose=verbose, as_json=json_)
    if not done.paths:
        raise typer.Exit(NoForecastError.exit_code)


@contextmanager
def _unshared(ranks: Ranks) -> Iterator[None]:
    """A block whose error, where another process writes the output too, says how a launcher's processes share it."""
    try:
        yield
    except TakenError as error:
        error.hint = "; ".join(filter(None, (error.hint, unshared_hint(ranks))))
        raise


def _tell(done: Prediction, *, quiet: bool, verbose: bool, as_json: bool) -> None:
    """What came of it."""
    from farcast_cli.commands import render

    if not quiet:
        render.predictions(done.outcomes, done.notes(), done.request, hint=done.advice(), verbose=verbose)
    render.unlogged(done.unlogged)
    if as_json:
        from farcast_cli import answers

        render.as_json(answers.of_predict(done.outcomes, dry_run=done.request.dry_run))
    elif not done.request.dry_run:
        render.paths(done.paths)
