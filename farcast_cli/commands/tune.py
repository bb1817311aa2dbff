"""The command `tune`, with its many options: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from farcast_cli.choices import DEFAULT_GATE, HOLDOUT, MOMENTUM, ActivationName, LossName
from farcast_cli.commands.options import (
    ActivationsOption,
    BiasesOption,
    ConfigOption,
    JsonOption,
    LayersOption,
    LossOption,
    QuietOption,
    RoundOption,
    RowsOption,
    ThreadsOption,
    TuneMethodOption,
    VerboseOption,
)
from farcast_cli.errors import NoGainError
from farcast_cli.settings import env, prepare

if TYPE_CHECKING:
    from farcast_cli.tune.request import TuneOutcome

EXAMPLES = (
    "Examples: farcast tune model.safetensors --layer fc.weight --data rows.npz --loss mse -o tuned.safetensors   |   "
    "farcast tune ckpts/step_100.pt --layer fc1.weight --bias fc1.bias --activation relu --head fc2.weight --data rows.npz"
    " --loss cross-entropy --delta-out delta.safetensors   |   "
    "farcast tune ckpts/step_100.pt --apply delta.safetensors -o tuned.pt"
)


def tune(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint to tune; it is not changed.")],
    layer: LayersOption = None,
    bias: BiasesOption = None,
    data: RowsOption = None,
    loss: LossOption = None,
    activation: ActivationsOption = None,
    head: Annotated[
        str | None,
        typer.Option(envvar=env("HEAD"), metavar="KEY", help="Name of the weight after the activation; it is not tuned."),
    ] = None,
    head_bias: Annotated[
        str | None, typer.Option(envvar=env("HEAD_BIAS"), metavar="KEY", help="Name of the bias of the head.")
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(envvar=env("ANCHOR"), metavar="FILE", help="File of rows x for which the layer's output must not change."),
    ] = None,
    tune_method: TuneMethodOption = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            envvar=env("ITERATIONS"),
            min=1,
            metavar="N",
            help="Maximum number of iterations. Default: 30 for gauss-newton, 300 for gradient-descent.",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            envvar=env("RATE"), metavar="X", help="Learning rate of gradient descent; by default computed from the curvature."
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(envvar=env("MOMENTUM"), help="Momentum of gradient descent.")] = MOMENTUM,
    weight_decay: Annotated[
        float, typer.Option(envvar=env("WEIGHT_DECAY"), min=0, help="Weight decay of gradient descent: a pull towards 0.")
    ] = 0.0,
    ridge: Annotated[
        float, typer.Option(envvar=env("RIDGE"), min=0, help="Strength of the pull towards the checkpoint's own weights.")
    ] = 0.0,
    holdout: Annotated[
        float,
        typer.Option(
            envvar=env("HOLDOUT"),
            help="Share of rows held out to accept or reject the result. Half as many again are used for early stopping.",
        ),
    ] = HOLDOUT,
    gate: Annotated[
        float, typer.Option(envvar=env("GATE"), help="Required gain on the held-out rows, in standard errors.")
    ] = DEFAULT_GATE,
    subsample: Annotated[
        int | None,
        typer.Option(envvar=env("SUBSAMPLE"), min=1, metavar="N", help="Use only N rows, drawn at random by --seed."),
    ] = None,
    round_: RoundOption = "nearest",
    seed: Annotated[
        int, typer.Option(envvar=env("SEED"), min=0, help="Seed of the row splits and of stochastic rounding.")
    ] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", envvar=env("OUTPUT"), metavar="OUT", help="The tuned checkpoint to write.")
    ] = None,
    delta_out: Annotated[
        Path | None,
        typer.Option(
            envvar=env("DELTA_OUT"),
            metavar="FILE",
            help="Write only the change, as low-rank factors, instead of a checkpoint.",
        ),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(envvar=env("APPLY"), metavar="FILE", help="Add a change that --delta-out wrote, instead of tuning."),
    ] = None,
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Adapt a wide layer to labelled rows; write it only if the loss on held-out rows improves significantly."""
    num_threads = prepare("cpu", threads)
    from farcast_cli.commands import render
    from farcast_cli.tune.delta import Rounded
    from farcast_cli.tune.one_layer import Settings
    from farcast_cli.tune.request import TuneRequest
    from farcast_cli.tune.run import apply_deltas, check_given, method_named, tune_checkpoint

    rounded = Rounded(round_, seed)
    with render.progress(quiet=quiet) as progress:
        if apply is not None:
            check_given({"--layer": layer, "--data": data, "--delta-out": delta_out}, {"-o": output}, of="--apply")
            outcome = apply_deltas(checkpoint, apply, cast("Path", output), rounded, num_threads=num_threads, progress=progress)
        else:
            check_given({}, {"--layer": layer, "--data": data, "--loss": loss}, of="tune")
            layers = tuple(layer or ())
            method = method_named(tune_method, num_layers=len(layers))
            request = TuneRequest(
                checkpoint,
                layers,
                cast("Path", data),
                cast("LossName", loss),
                tuple(bias or ()),
                cast("tuple[ActivationName, ...]", tuple(activation or ("none",))),
                head,
                head_bias,
                anchor,
                Settings(method, iterations, rate, momentum, weight_decay, ridge),
                holdout=holdout,
                gate=gate,
                subsample=subsample,
                rounded=rounded,
                output=output,
                delta_out=delta_out,
                num_threads=num_threads,
            )
            outcome = tune_checkpoint(request, progress)
    _tell(outcome, quiet=quiet, as_json=json_)


def _tell(outcome: TuneOutcome, *, quiet: bool, as_json: bool) -> None:
    """What came of it; ends with the gate's own exit code where it was against it."""
    from farcast_cli.commands import render

    if not quiet:
        render.tune_summary(outcome)
    if as_json:
        from farcast_cli.answers import of_tune

        render.as_json(of_tune(outcome))
    elif outcome.path:
        render.paths([outcome.path])
    if outcome.path is None:
        raise typer.Exit(NoGainError.exit_code)
