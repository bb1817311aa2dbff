"""The command `backtest`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli import api
from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_SAMPLE
from farcast_cli.commands.fit import fitted_by
from farcast_cli.commands.options import (
    ClockOption,
    ConfigOption,
    DeviceOption,
    ExcludeOption,
    ForecasterOption,
    FullOption,
    HistoryOption,
    IncludeOption,
    IoOption,
    JsonOption,
    LedgerOption,
    MethodOption,
    PatternOption,
    PurposeOption,
    QuietOption,
    SampleOption,
    StepFromOption,
    StepsOption,
    ThreadsOption,
    UnitOption,
    VerboseOption,
    WeightsOption,
)
from farcast_cli.horizons import parse_horizons
from farcast_cli.settings import env

EXAMPLES = "Example: farcast backtest --horizon 500,1000,2000"


def backtest(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="Folder with the run's checkpoints; by default the run of the forecaster file."),
    ] = None,
    horizon: Annotated[
        str | None,
        typer.Option(
            envvar=env("HORIZON"),
            metavar="N[,N...]",
            help="Steps ahead, such as 500, 1k or 20% (of the history); by default some shares of the history.",
        ),
    ] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    purpose: PurposeOption = "resume",
    method: MethodOption = None,
    clock: ClockOption = None,
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
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Test every method inside the run's own history, and show the verdict."""
    parse_horizons(horizon)  # what cannot be is refused before the folder is read
    from farcast_cli.commands import render
    from farcast_cli.forecast.forecaster_file import load_fitted

    run = fitted_by(
        directory,
        forecaster,
        context=context,
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
    fitted = load_fitted(run) if isinstance(run, Path) else run
    report = api.backtest(fitted, horizon=horizon, purpose=purpose, method=method, clock=clock, device=device)
    if json_:
        from farcast_cli import answers

        render.as_json(answers.of_backtest(report))
    else:
        render.backtest(report, verbose=verbose)
    if not (horizon or quiet):
        render.note(render.proposal(fitted, purpose))
