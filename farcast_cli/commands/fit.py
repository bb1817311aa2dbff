"""The command `fit`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_RANKS_TIMEOUT, DEFAULT_SAMPLE
from farcast_cli.commands.options import (
    ConfigOption,
    DeviceOption,
    ExcludeOption,
    FullOption,
    HistoryOption,
    IncludeOption,
    IoOption,
    JsonOption,
    LedgerOption,
    LogToOption,
    LossesOption,
    PatternOption,
    QuietOption,
    RanksOption,
    RanksTimeoutOption,
    SampleOption,
    StepFromOption,
    StepsOption,
    ThreadsOption,
    UnitOption,
    VerboseOption,
    WeightsOption,
    is_given,
)
from farcast_cli.errors import UsageError, shell_word
from farcast_cli.log_to import check_apart, log_answer, parse_targets
from farcast_cli.settings import env, fit_request, seat_of, team_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.forecast.fitting import FitOutcome, FitRequest
    from farcast_cli.forecast.forecaster_file import Fitted

EXAMPLES = "Example: farcast fit ckpts/ --steps 2000: && farcast predict --horizon 1000"


def fit(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run's checkpoints.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", envvar=env("FORECASTER"), metavar="FILE", help="The forecaster file to write.")
    ] = DEFAULT_FORECASTER,
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
    losses: LossesOption = None,
    log_to: LogToOption = None,
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
    """Read a sample of every tensor at every snapshot, and write the forecaster file."""
    seat = seat_of(ranks)
    if seat.rank:
        context.obj.rank, quiet = seat.rank, True
    targets = parse_targets(log_to)
    check_apart(targets, directory)
    request = fit_request(
        directory,
        output=output,
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
        team=team_of(ranks, ranks_timeout),
        losses=losses,
    )
    from farcast_cli import answers
    from farcast_cli.commands import render

    done = learn(request, quiet=quiet)
    if seat.rank:
        return
    answer = answers.of_fit(done, output)
    if json_:
        render.as_json(answer)
    else:
        render.paths([output])
    if not quiet:
        render.fit_summary(done, output, verbose=verbose)
    render.unlogged(log_answer(targets, "fit", answer, directory))


def learn(request: FitRequest, *, quiet: bool) -> FitOutcome:
    """Learn from a run, and say first what a person should know of it."""
    from farcast_cli.commands import render
    from farcast_cli.forecast.fitting import fit_planned, plan_fit

    plan = plan_fit(request)
    if not quiet:
        render.fit_cautions(plan)
    with render.progress(quiet=quiet) as progress:
        return fit_planned(plan, progress)


def fitted_by(
    directory: Path | None,
    forecaster: Path,
    *,
    context: typer.Context,
    needs: Sequence[str] = (),
    quiet: bool,
    **options: Any,
) -> Fitted | Path:
    """The forecaster of a folder, fitted in memory; its file where no folder is named.

    Args:
        needs: the options that speak of a folder.
        options: of `fit_request`, which are for a folder.

    Raises:
        UsageError: the command line names both, or a forecaster file in place of the folder, or chooses parts of a folder that it does not name.
    """
    if directory is None:
        lost = next((f"--{name.replace('_', '-')}" for name in needs if is_given(context, name)), None)
        if lost:
            raise UsageError(
                f"{lost}: chooses from a folder, and none is named", hint=f"farcast {context.info_name} DIR {lost} ..."
            )
        return forecaster
    from farcast_cli.run.entries import is_own_file

    if is_own_file(directory):
        raise UsageError(
            f"{directory}: expected a folder of checkpoints, found a forecaster file",
            hint=f"farcast {context.info_name} --forecaster {shell_word(directory)}",
        )
    request = fit_request(directory, **options)
    if is_given(context, "forecaster"):
        raise UsageError("expected a folder or --forecaster FILE, found both", hint="a folder is fitted in memory")
    return learn(request, quiet=quiet).fitted
