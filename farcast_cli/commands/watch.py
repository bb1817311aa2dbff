"""The command `watch`: parse, one library call, render."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from farcast_cli import api
from farcast_cli.choices import DEFAULT_INTERVAL, DEFAULT_LEDGER, KeepForm
from farcast_cli.commands import streams
from farcast_cli.commands.options import (
    ConfigOption,
    DeviceOption,
    ExcludeOption,
    IncludeOption,
    IoOption,
    JsonOption,
    LedgerOption,
    LogToOption,
    PatternOption,
    QuietOption,
    StepFromOption,
    ThreadsOption,
    UnitOption,
    WeightsOption,
    choice,
)
from farcast_cli.settings import env

EXAMPLES = "Examples: farcast watch ckpts/   |   farcast watch ckpts/ --leap --keep weights --on-leap 'sbatch resume.sh {ckpt}'"


def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run's checkpoints; it may not exist yet.")],
    interval: Annotated[
        float, typer.Option(envvar=env("INTERVAL"), metavar="SECONDS", help="Time between two looks at the folder.")
    ] = DEFAULT_INTERVAL,
    until: Annotated[
        int | None,
        typer.Option(envvar=env("UNTIL"), metavar="STEP", help="End at this step. The watch ends with the run, too."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", envvar=env("ONCE"), help="Judge what is there after one interval, and end.")
    ] = False,
    keep: Annotated[
        KeepForm,
        choice(
            KeepForm,
            "--keep",
            text="what is kept of each snapshot: the values that fit reads, or all weights, as predict may need.",
        ),
    ] = "sampled",
    into: Annotated[
        Path | None,
        typer.Option(envvar=env("INTO"), metavar="FOLDER", help="Folder for the kept snapshots. Default: kept/NAME."),
    ] = None,
    leap: Annotated[
        bool,
        typer.Option("--leap", envvar=env("LEAP"), help="Write the forecast when the verdict supports it; print its path."),
    ] = False,
    on_leap: Annotated[
        str | None,
        typer.Option(envvar=env("ON_LEAP"), metavar="'CMD {ckpt}'", help="Command that runs after a forecast was written."),
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    pattern: PatternOption = None,
    step_from: StepFromOption = None,
    unit: UnitOption = "step",
    weights: WeightsOption = None,
    ledger: LedgerOption = DEFAULT_LEDGER,
    log_to: LogToOption = None,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Follow a run while it trains: keep each new checkpoint, judge the run with it, and say so in a line.

    It looks at the folder again and again, until the run ends or you interrupt it.
    """
    from farcast_cli.commands import view

    with view.viewing(directory, as_json=json_, has_paths=leap, quiet=quiet) as shown:
        events = api.watch(
            directory,
            interval=interval,
            until=until,
            once=once,
            keep=keep,
            into=into,
            leap=leap,
            on_leap=on_leap,
            include=include,
            exclude=exclude,
            pattern=pattern,
            step_from=step_from,
            unit=unit,
            weights=weights,
            ledger=ledger,
            log_to=log_to,
            device=device,
            io=io,
            threads=threads,
            progress=shown.progress,
        )
        with closing(events):
            for event in events:
                shown.show(event)
                if streams.is_broken():
                    break
