"""The command `backtest`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_SAMPLE
from farcast_cli.commands.fit import fitted_by
from farcast_cli.commands.horizons import in_steps, parse_horizons
from farcast_cli.commands.options import (
    ClockOption,
    ConfigOption,
    DeviceOption,
    ExcludeOption,
    ForecasterOption,
    FullOption,
    IncludeOption,
    IoOption,
    JsonOption,
    LedgerOption,
    MethodOption,
    PatternOption,
    PurposeOption,
    QuietOption,
    SampleOption,
    StepsOption,
    ThreadsOption,
    VerboseOption,
    env,
    ledgers_of,
    resources_of,
    selection_of,
)

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
    parsed = parse_horizons(horizon)
    resources = resources_of(device, io, threads)
    from farcast_cli.commands import answers, render
    from farcast_cli.forecast.fitting import FitRequest
    from farcast_cli.forecast.judgement import report_backtest

    of_folder = None
    if directory:
        selection = selection_of(directory, include, exclude, steps, pattern)
        of_folder = FitRequest(selection, None if full else sample, ledgers_of(ledger), resources)
    fitted = fitted_by(of_folder, forecaster, context=context, quiet=quiet)
    horizons = in_steps(parsed, fitted)
    report = report_backtest(fitted, horizons, method=method, purpose=purpose, clock=clock, device=resources.device)
    if json_:
        render.as_json(answers.of_backtest(report))
    else:
        render.backtest(report, verbose=verbose)
