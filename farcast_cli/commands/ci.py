"""The command `ci`: parse, one library call, render."""

from __future__ import annotations

from typing import Annotated

import typer

from farcast_cli.errors import UsageError
from farcast_cli.texts import names_of, read_text

EXAMPLES = "Example: farcast ci periodic.sh > periodic.sh"


def ci(
    script: Annotated[
        str | None,
        typer.Argument(
            metavar="[SCRIPT]",
            autocompletion=lambda: names_of("scripts"),
            help="capture.py, forecast.sh or periodic.sh; by default the names of the scripts are printed.",
        ),
    ] = None,
) -> None:
    """Print a script: to forecast a run in a CI job, to train and leap in a loop, or to write rows for tune."""
    from farcast_cli.commands import render

    scripts = names_of("scripts")
    if script is not None and script not in scripts:
        raise UsageError(f"{script}: expected one of {', '.join(scripts)}", hint="farcast help ci")
    render.text("".join(f"{name}\n" for name in scripts) if script is None else read_text("scripts", script))
