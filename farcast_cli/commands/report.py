"""The command `report`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farcast_cli import api
from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, DEFAULT_REPORT, DEFAULT_SAMPLE, PrintedForm
from farcast_cli.commands.fit import fitted_by
from farcast_cli.commands.options import (
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
    LossesOption,
    PatternOption,
    PurposeOption,
    QuietOption,
    SampleOption,
    StepFromOption,
    StepsOption,
    ThreadsOption,
    UnitOption,
    WeightsOption,
    choice,
    is_given,
)
from farcast_cli.commands.predict import CHOOSING
from farcast_cli.errors import UsageError
from farcast_cli.settings import env

if TYPE_CHECKING:
    from farcast_cli.returned import Report

EXAMPLES = "Examples: farcast report   |   farcast report ckpts/ -o run.png   |   farcast report --format markdown >> $GITHUB_STEP_SUMMARY"


def report(
    context: typer.Context,
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN|FORECASTER]",
            help="Folder with the run's checkpoints, to fit in memory, or a forecaster file; by default the forecaster file that fit wrote.",
        ),
    ] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            envvar=env("REPORT"),
            metavar="FILE.html|.png|.md",
            help="The file to write: a page, a picture or Markdown. Default: report.html, or no file with --format, --text or --json.",
        ),
    ] = None,
    form: Annotated[
        PrintedForm | None,
        choice(
            PrintedForm,
            "--format",
            text="Print the report in this form on stdout.",
            hint="-o report.png writes a picture, -o report.html a page",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", envvar=env("TEXT"), help="Print the report for a terminal of 44 columns: --format text.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", envvar=env("OVERWRITE"), help="Replace a file that is not a report, too.")
    ] = False,
    purpose: PurposeOption = "resume",
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
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Write the verdict on a run and its evidence as one page, picture or text."""
    form = "text" if text else form
    place = _place(output, form=form, as_json=json_)
    directory, forecaster = _source(target, forecaster, context)
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
        losses=losses,
    )
    done = api.report(
        run,
        output=place,
        overwrite=overwrite,
        purpose=purpose,
        ledger=ledger,
        losses=losses,
        device=device,
        io=io,
        threads=threads,
    )
    _tell(done, form=form, as_json=json_)


def _place(output: Path | None, *, form: PrintedForm | None, as_json: bool) -> Path | None:
    """The file to write, if one is.

    Raises:
        UsageError: a file and a form to print are asked for, which are two reports; or no file of such a name can be made.
    """
    if output and form:
        raise UsageError(f"expected -o FILE or --format {form}, found both", hint="-o FILE.md writes Markdown into a file")
    from farcast_cli.reports.output import check_form

    place = output or (None if form or as_json else DEFAULT_REPORT)
    check_form(place)  # before the run is read
    return place


def _source(target: Path | None, forecaster: Path, context: typer.Context) -> tuple[Path | None, Path]:
    """The run's folder, if that is what to read, and the forecaster file.

    Raises:
        UsageError: two forecaster files.
    """
    if target is None or target.is_dir() or not target.exists():
        return target, forecaster
    if is_given(context, "forecaster"):
        raise UsageError(f"expected one forecaster file, found {target} and --forecaster {forecaster}")
    return None, target


def _tell(done: Report, *, form: PrintedForm | None, as_json: bool) -> None:
    """The path, or the report itself."""
    from farcast_cli.commands import render

    if as_json:
        from farcast_cli import answers

        render.as_json(answers.of_report(done.story, done.path))
    elif form:
        render.text(done.markdown() if form == "markdown" else done.text(is_plain=not render.has_blocks()))
    elif done.path:
        render.paths([done.path])
