"""The command `inspect`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli.commands.options import (
    ConfigOption,
    ExcludeOption,
    IncludeOption,
    JsonOption,
    PatternOption,
    QuietOption,
    StepsOption,
    VerboseOption,
    selection_of,
)

EXAMPLES = "Example: farcast inspect ckpts/ --json | jq '.snapshots[].step'"


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run's checkpoints.")],
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """List the snapshots, the evidence for their steps, and the tensors to forecast and to copy."""
    from farcast_cli.commands import answers, render
    from farcast_cli.run.selection import inspect as run

    found = run(selection_of(directory, include, exclude, steps, pattern))
    if json_:
        render.as_json(answers.of_inspect(found))
    else:
        render.inspection(found, verbose=verbose)
    if found.fatal:
        raise typer.Exit(found.fatal.exit_code)
