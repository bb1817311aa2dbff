"""The command `inspect`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farcast_cli.choices import DEFAULT_LEDGER
from farcast_cli.commands.options import (
    ConfigOption,
    ExcludeOption,
    HistoryOption,
    IncludeOption,
    JsonOption,
    LedgerOption,
    PatternOption,
    QuietOption,
    StepFromOption,
    StepsOption,
    UnitOption,
    VerboseOption,
    WeightsOption,
)
from farcast_cli.settings import ledgers_of, prepare, selection_of

EXAMPLES = "Example: farcast inspect ckpts/ --json | jq '.snapshots[].step'"


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run's checkpoints.")],
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    step_from: StepFromOption = None,
    unit: UnitOption = "step",
    weights: WeightsOption = None,
    history: HistoryOption = None,
    ledger: LedgerOption = DEFAULT_LEDGER,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """List the snapshots, the evidence for their steps, the tensors to forecast and to copy, and the leaps of the run."""
    prepare("cpu")
    from farcast_cli.commands import render
    from farcast_cli.forecast.history import past_of
    from farcast_cli.run.losses import losses_of
    from farcast_cli.run.selection import inspect as run

    selection = selection_of(
        directory, include, exclude, steps, pattern, history=history, step_from=step_from, unit=unit, weights=weights
    )
    found = run(selection)
    past = None if found.fatal else past_of(found.trajectory, ledgers_of(ledger), chosen=selection.steps, minimum=0)
    worth = past.worth(losses_of(found.trajectory)) if past else None
    if json_:
        from farcast_cli import answers

        render.as_json(answers.of_inspect(found, past, worth))
    else:
        render.inspection(found, past, worth, verbose=verbose)
    if found.fatal:
        raise typer.Exit(found.fatal.exit_code)
