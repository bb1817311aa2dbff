"""The command `leap`: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farcast_cli import api
from farcast_cli.choices import DEFAULT_LEDGER, CountersMode
from farcast_cli.commands.options import (
    ClockOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    EvalTimeoutOption,
    ExcludeOption,
    IncludeOption,
    IoOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    LedgerOption,
    LogToOption,
    LossesOption,
    MaximizeOption,
    OptimizerOption,
    OverwriteOption,
    PatternOption,
    PlaceOption,
    QuietOption,
    StepFromOption,
    StepsOption,
    ThreadsOption,
    UnitOption,
    VerboseOption,
    WeightsOption,
    choice,
)
from farcast_cli.errors import NoForecastError
from farcast_cli.settings import env

if TYPE_CHECKING:
    from farcast_cli.leaps.ask import Leapt
    from farcast_cli.request import Outcome

EXAMPLES = (
    "Examples: farcast leap ckpts/   |   farcast leap ckpts/ --eval-cmd 'python eval.py {ckpt}'   |   "
    "next=$(farcast leap ckpts/) || [ $? -eq 10 ]"
)


def leap(
    directory: Annotated[Path, typer.Argument(metavar="RUN", help="Folder with the run's checkpoints.")],
    every: Annotated[
        int | None,
        typer.Option(
            envvar=env("EVERY"), min=1, metavar="N", help="Steps until the next leap; by default as many as since the last one."
        ),
    ] = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option(
            envvar=env("EVAL_CMD"),
            metavar="'CMD {ckpt}'",
            help="Command that measures the loss: farcast reads the last number that it prints. It runs three times: on the newest "
            "checkpoint, and on weights a little ahead of it and a little behind. The first call of a run does not run it.",
        ),
    ] = None,
    maximize: MaximizeOption = False,
    jobs: JobsOption = 1,
    eval_timeout: EvalTimeoutOption = None,
    gain: Annotated[
        float | None,
        typer.Option(envvar=env("GAIN"), min=0, metavar="X", help="Leap by exactly X stretches, whatever the evidence."),
    ] = None,
    max_gain: Annotated[
        float | None,
        typer.Option(envvar=env("MAX_GAIN"), min=0, metavar="X", help="Largest gain; default: 4 with --eval-cmd, 1 without."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            envvar=env("OUTPUT"),
            metavar="OUT",
            help="Path of the checkpoint, or of a folder if it ends in /; the memory is written next to it. Default: forecasts/RUN/, where RUN is the name of the run's folder.",
        ),
    ] = None,
    place: PlaceOption = None,
    counters: Annotated[
        CountersMode,
        choice(
            CountersMode,
            "--counters",
            env_name="LEAP_COUNTERS",
            text="keep the trainer's counters and schedule as they are, or advance them with the weights.",
        ),
    ] = "keep",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    steps: StepsOption = None,
    pattern: PatternOption = None,
    step_from: StepFromOption = None,
    unit: UnitOption = "step",
    weights: WeightsOption = None,
    clock: ClockOption = None,
    optimizer: OptimizerOption = "copy",
    layout: LayoutOption = "same",
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", envvar=env("EVEN_IF_WORSE"), help="Leap even if the evidence is against it.")
    ] = False,
    overwrite: OverwriteOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    losses: LossesOption = None,
    log_to: LogToOption = None,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Leap from the newest checkpoint, with a memory, for a loop. Print the path to resume from; exit with 10 if none.

    Each call reads the newest checkpoint, the last leap and the memory of the run's moves. It decides, and writes a
    checkpoint whose weights are ahead. The step, the schedule and the other counters stay, so that the run trains all its
    steps; --counters advance moves them too. The trainer may keep only one checkpoint.
    """
    from farcast_cli.commands import render

    with render.progress(quiet=quiet) as progress:
        done = api.leap(
            directory,
            every=every,
            eval_cmd=eval_cmd,
            maximize=maximize,
            jobs=jobs,
            eval_timeout=eval_timeout,
            gain=gain,
            max_gain=max_gain,
            output=output,
            place=place,
            counters=counters,
            include=include,
            exclude=exclude,
            steps=steps,
            pattern=pattern,
            step_from=step_from,
            unit=unit,
            weights=weights,
            clock=clock,
            optimizer=optimizer,
            layout=layout,
            even_if_worse=even_if_worse,
            overwrite=overwrite,
            ledger=ledger,
            dry_run=dry_run,
            device=device,
            io=io,
            threads=threads,
            losses=losses,
            log_to=log_to,
            progress=progress,
        )
    if not quiet:
        _summary(done, counters=counters, dry_run=dry_run, verbose=verbose)
    render.unlogged(done.unlogged)
    if json_:
        from farcast_cli import answers

        render.as_json(answers.of_leap(done, dry_run=dry_run))
    elif done.outcome.path and not dry_run:
        render.paths([done.outcome.path])
    if done.outcome.decision.verdict != "forecast":
        raise typer.Exit(NoForecastError.exit_code)


def _summary(done: Leapt, *, counters: CountersMode, dry_run: bool, verbose: bool) -> None:
    from farcast_cli.commands import render
    from farcast_cli.forecast.words import counted

    outcome, momentum, reason = done.outcome, done.momentum, done.outcome.decision.reason
    unit = outcome.rule.unit
    head, length = f"{unit} {outcome.origin_step}", counted(outcome.horizon, unit)
    for text in done.notes:
        render.note(text if text.startswith("caution: ") else f"note: {text}")
    if done.worth:
        render.note(done.worth.told())
    if outcome.decision.verdict != "forecast":
        render.note(f"{head}: no leap: {reason}")
    elif done.is_again:
        render.note(
            f"{head}: no training since the last call, so its leap is given again, whatever the options; train on for a new one"
        )
    elif dry_run:
        render.note(f"{head}: would leap {length}: {reason}; {_counters(outcome, counters)}")
    else:
        render.note(
            f"{head}: a leap of {length}: {reason}; {_counters(outcome, counters)};"
            f" {render.size(outcome.bytes_written)} in {outcome.seconds:.1f} s"
        )
        render.copied_note(outcome.copied, verbose=verbose)
        for text in outcome.notes:
            render.note(f"note: {text}")
    for trial in outcome.trials:
        where = "ahead" if trial.strength > 0 else "behind"
        place = f"{abs(trial.strength):g} of a stretch {where}" if trial.strength else "of the newest checkpoint"
        render.note(f"evaluation {place}: {trial.value:g}, in {trial.seconds:.1f} s")
    if outcome.decision.verdict != "forecast":
        render.note(f"go on from {done.origin}")
    if not done.is_again and not done.is_last:
        when = (
            f"{counted(done.every, unit).replace(' ', ' more ')}"
            if momentum.count
            else "the next stretch, about 2 % of the run,"
        )
        render.note(f"call again after {when} of training")


def _counters(outcome: Outcome, counters: CountersMode) -> str:
    """At which step the trainer goes on."""
    if counters == "advance":
        return f"the counters advance to {outcome.rule.unit} {outcome.valid_step}"
    return f"the counters stay at {outcome.rule.unit} {outcome.origin_step}"
