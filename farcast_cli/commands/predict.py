"""The command `predict`: parse, one library call, render."""

from __future__ import annotations

from typing import Annotated

import typer

from farcast_cli.choices import DEFAULT_FORECASTER, DEFAULT_LEDGER, CountersMode
from farcast_cli.commands.options import (
    ClockOption,
    ConfigOption,
    DeviceOption,
    DryRunOption,
    DTypeOption,
    EvalTimeoutOption,
    ForecasterOption,
    GradWeightOption,
    IoOption,
    JobsOption,
    JsonOption,
    LayoutOption,
    LedgerOption,
    MaximizeOption,
    MethodOption,
    OptimizerOption,
    OverwriteOption,
    PurposeOption,
    QuietOption,
    ScopeOption,
    StepNormOption,
    ThreadsOption,
    VerboseOption,
    check_horizon_options,
    choice,
    env,
    evaluator_of,
    ledgers_of,
    parse_horizons,
    parse_size,
    resources_of,
)
from farcast_cli.errors import NoForecastError

EXAMPLES = (
    "Examples: farcast predict --horizon 1000   |   farcast predict --horizon 500,1000,2000 -o leaps/   |   "
    "farcast predict --to-step 20000 --eval-cmd 'python eval.py {ckpt}'"
)


def predict(
    horizon: Annotated[
        str | None,
        typer.Option(
            envvar=env("HORIZON"),
            metavar="N[,N...]",
            help="Steps ahead; several horizons are written in one pass. By default farcast chooses it by evidence.",
        ),
    ] = None,
    to_step: Annotated[
        int | None, typer.Option(envvar=env("TO_STEP"), metavar="N", help="Step to forecast, instead of --horizon.")
    ] = None,
    forecaster: ForecasterOption = DEFAULT_FORECASTER,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            envvar=env("OUTPUT"),
            metavar="OUT",
            help="Path of the checkpoint; if it ends in / or there are several horizons, a folder for the checkpoints."
            " Default: forecasts/NAME.",
        ),
    ] = None,
    purpose: PurposeOption = "resume",
    method: MethodOption = None,
    step_norm: StepNormOption = None,
    scale: Annotated[float, typer.Option(envvar=env("SCALE"), help="Factor on the update.")] = 1.0,
    scope: ScopeOption = "auto",
    clock: ClockOption = None,
    grad_weight: GradWeightOption = 0.0,
    origin: Annotated[
        int | None,
        typer.Option(envvar=env("ORIGIN"), metavar="STEP", help="Step of the snapshot to forecast from; by default the last."),
    ] = None,
    optimizer: OptimizerOption = "copy",
    counters: Annotated[
        CountersMode,
        choice(CountersMode, "--counters", text="advance the trainer's counters and schedule with the weights, or keep them."),
    ] = "advance",
    dtype: DTypeOption = "source",
    layout: LayoutOption = "same",
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            envvar=env("MAX_SHARD_SIZE"),
            metavar="SIZE",
            help="Largest size of a shard, such as 5GB; by default the run's own shards.",
        ),
    ] = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option(
            envvar=env("EVAL_CMD"),
            metavar="'CMD {ckpt}'",
            help="Command that scores a checkpoint: farcast reads the last number that it prints. It runs on your last snapshot and on"
            " the forecast, and must not change them. The forecast is published only if its score is better.",
        ),
    ] = None,
    maximize: MaximizeOption = False,
    jobs: JobsOption = 1,
    eval_timeout: EvalTimeoutOption = None,
    even_if_worse: Annotated[
        bool, typer.Option("--even-if-worse", envvar=env("EVEN_IF_WORSE"), help="Write the forecast whatever the verdict.")
    ] = False,
    overwrite: OverwriteOption = False,
    ledger: LedgerOption = DEFAULT_LEDGER,
    dry_run: DryRunOption = False,
    device: DeviceOption = "auto",
    io: IoOption = "auto",
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Write the forecast checkpoint if the run's own history supports it; print its path on stdout."""
    check_horizon_options(horizon, to_step)
    resources = resources_of(device, io, threads)
    from farcast_cli import predict as library
    from farcast_cli.commands import answers, render
    from farcast_cli.forecast.forecaster import Options
    from farcast_cli.forecast.forecaster_file import load_fitted
    from farcast_cli.request import Request

    fitted = load_fitted(forecaster)
    request = Request(
        horizons=parse_horizons(horizon),
        to_step=to_step,
        purpose=purpose,
        method=method,
        options=Options(step_norm, scale, scope, grad_weight),
        origin_step=origin,
        optimizer=optimizer,
        counters=counters,
        dtype=dtype,
        layout=layout,
        max_shard_bytes=parse_size(max_shard_size),
        output=output,
        even_if_worse=even_if_worse,
        overwrite=overwrite,
        dry_run=dry_run,
        ledgers=ledgers_of(ledger),
        clock=clock,
        resources=resources,
        evaluator=evaluator_of(eval_cmd, maximize=maximize, jobs=jobs, timeout_s=eval_timeout),
    )
    with render.progress(quiet=quiet) as progress:
        outcomes = library.predict(fitted, request, progress)
    if not quiet:
        render.predictions(outcomes, library.default_notes(fitted, request, outcomes), dry_run=dry_run, verbose=verbose)
    if json_:
        render.as_json(answers.of_predict(outcomes, dry_run=dry_run))
    elif not dry_run:
        render.paths([outcome.path for outcome in outcomes if outcome.path])
    if not any(outcome.path for outcome in outcomes):
        raise typer.Exit(NoForecastError.exit_code)
