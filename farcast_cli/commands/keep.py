"""The command `keep`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli import api
from farcast_cli.commands.options import (
    ConfigOption,
    JsonOption,
    PatternOption,
    QuietOption,
    StepFromOption,
    StepsOption,
    UnitOption,
    WeightsOption,
)
from farcast_cli.settings import env

EXAMPLES = "Example: while sleep 60; do farcast keep ckpts/; done    # then: farcast fit ckpts/"


def keep(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run's checkpoints.")],
    into: Annotated[
        Path | None,
        typer.Option(envvar=env("INTO"), metavar="FOLDER", help="Folder for the kept snapshots. Default: kept/NAME."),
    ] = None,
    sampled: Annotated[
        bool,
        typer.Option(
            "--sampled",
            envvar=env("SAMPLED"),
            help="Keep only the values that fit reads: a few MB for any model, enough to judge; predict needs whole weights.",
        ),
    ] = False,
    last: Annotated[
        int | None,
        typer.Option(envvar=env("LAST"), metavar="N", help="Keep the newest N; remove the older ones that farcast kept."),
    ] = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    step_from: StepFromOption = None,
    unit: UnitOption = "step",
    weights: WeightsOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    config: ConfigOption = None,
) -> None:
    """Copy the weights of new checkpoints before the trainer deletes them; fit reads the copies.

    Call it after each save. It copies only what is not kept yet: weights and counters, without the optimiser's state.
    """
    from farcast_cli.commands import render

    with render.progress(quiet=quiet) as progress:
        done = api.keep(
            directory,
            into=into,
            sampled=sampled,
            last=last,
            steps=steps,
            pattern=pattern,
            step_from=step_from,
            unit=unit,
            weights=weights,
            progress=progress,
        )
    if not quiet:
        render.keeping(done)
    if json_:
        from farcast_cli import answers

        render.as_json(answers.of_keep(done))
    else:
        render.paths(done.added)
