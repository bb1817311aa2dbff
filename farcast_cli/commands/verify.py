"""The command `verify`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli import api
from farcast_cli.commands.options import (
    ConfigOption,
    JsonOption,
    QuietOption,
    VerboseOption,
)
from farcast_cli.settings import env

EXAMPLES = "Example: farcast verify forecasts/ckpts/checkpoint-1500 --against ckpts/checkpoint-1500"


def verify(
    forecast: Annotated[Path, typer.Argument(metavar="FORECAST", help="The forecast that predict wrote.")],
    against: Annotated[Path, typer.Option(envvar=env("AGAINST"), metavar="CKPT", help="The run's own snapshot at that step.")],
    reference: Annotated[
        Path | None,
        typer.Option(
            envvar=env("REFERENCE"),
            metavar="CKPT",
            help="Snapshot to measure the error against; by default the forecast's origin.",
        ),
    ] = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Compare a forecast with the real snapshot, when training has reached its step."""
    from farcast_cli.commands import render

    with render.progress(quiet=quiet) as progress:
        result = api.verify(forecast, against=against, reference=reference, progress=progress)
    if not quiet:
        render.verify_note(result)
    if json_:
        render.as_json(result)
    else:
        render.verify_table(result, verbose=verbose)
