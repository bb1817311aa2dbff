"""The command `schema`: parse, one library call, render."""

from __future__ import annotations

from typing import Annotated

import typer

from farcast_cli.commands.options import ConfigOption
from farcast_cli.errors import UsageError

EXAMPLES = "Example: farcast schema predict > predict.schema.json"


def schema(
    command: Annotated[
        str | None,
        typer.Argument(metavar="[COMMAND]", help="Name of a command, sidecar or error; by default an object with all of them."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Print the JSON schema of a command's --json output, or of a sidecar."""
    from farcast_cli import results
    from farcast_cli.commands import render

    if command is not None and command not in results.ANSWERS:
        raise UsageError(f"{command}: expected one of {', '.join(results.ANSWERS)}", hint="farcast schema --help")
    render.schema(results.schema(command) if command else {name: results.schema(name) for name in results.ANSWERS})
