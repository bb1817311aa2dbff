"""The command `tune`, with its many options: parse, one library call, render."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from farcast_cli.choices import DEFAULT_GATE, DEFAULT_WEIGHT, FOLDS, MOMENTUM, ActivationName, LossName
from farcast_cli.commands.options import (
    ActivationsOption,
    BiasesOption,
    ConfigOption,
    JsonOption,
    LayersOption,
    LossOption,
    OverwriteOption,
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
    transposed: Annotated[
        bool,
        typer.Option(
            "--transposed",
            envvar=env("TRANSPOSED"),
            help="The layers are stored as inputs x outputs, as GPT-2's Conv1D is; so is the head, if it fits that way.",
        ),
    ] = False,
    anchor: Annotated[
        Path | None,
        typer.Option(envvar=env("ANCHOR"), metavar="FILE", help="File of rows x for which the layer's output must not change."),
    ] = None,
    anchor_weight: Annotated[
        float | None,
        typer.Option(
            envvar=env("ANCHOR_WEIGHT"),
            metavar="X",
            help="Let the outputs of the anchors change, the less the larger X is; with --covariance, the weight of that."
            f" Default: none of --anchor, {DEFAULT_WEIGHT:g} for --covariance.",
        ),
    ] = None,
    covariance: Annotated[
        Path | None,
        typer.Option(
            envvar=env("COVARIANCE"),
            metavar="FILE",
            help="Covariance of inputs for which the layer's output should change little; --covariance-out writes it.",
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            envvar=env("VAL"),
            metavar="FILE",
            help=f"File of other rows that judge the result. Default: rows of --data that are left out, one by one or in {FOLDS} folds.",
        ),
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
    momentum: Annotated[
        float | None,
        typer.Option(envvar=env("MOMENTUM"), metavar="X", help=f"Momentum of gradient descent. Default: {MOMENTUM}."),
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(envvar=env("WEIGHT_DECAY"), metavar="X", help="Weight decay of gradient descent: a pull towards 0."),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option(
            envvar=env("RIDGE"),
            metavar="X",
            help="Strength of the pull towards the checkpoint's own weights. Default: chosen by rows left out for a last layer with"
            " mse, else 0.",
        ),
    ] = None,
    gate: Annotated[
        float, typer.Option(envvar=env("GATE"), help="Required gain on rows that were not seen, in standard errors.")
    ] = DEFAULT_GATE,
    subsample: Annotated[
        int | None,
        typer.Option(envvar=env("SUBSAMPLE"), min=1, metavar="N", help="Use only N rows, drawn at random by --seed."),
    ] = None,
    round_: RoundOption = "nearest",
    seed: Annotated[
        int, typer.Option(envvar=env("SEED"), min=0, help="Seed of the folds, of --subsample and of stochastic rounding.")
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
    lora_out: Annotated[
        Path | None,
        typer.Option(envvar=env("LORA_OUT"), metavar="DIR", help="Write only the change, as a peft adapter of LoRA's form."),
    ] = None,
    covariance_out: Annotated[
        Path | None,
        typer.Option(
            envvar=env("COVARIANCE_OUT"),
            metavar="FILE",
            help="Write the covariance of x for --covariance, instead of tuning; --data may be of any length, and needs no y.",
        ),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(envvar=env("APPLY"), metavar="FILE", help="Add a change that --delta-out wrote, instead of tuning."),
    ] = None,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = 0,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    config: ConfigOption = None,
) -> None:
    """Adapt a layer to labelled rows; write it only if the loss on rows that it has not seen improves significantly."""
    num_threads = prepare("cpu", threads)
    from farcast_cli.commands import render
    from farcast_cli.tune.delta import Rounded
    from farcast_cli.tune.layers import Settings
    from farcast_cli.tune.request import TuneRequest
    from farcast_cli.tune.run import apply_deltas, check_given, covariance_of, method_named, tune_checkpoint

    others: dict[str, object] = {"--delta-out": delta_out, "--lora-out": lora_out}
    with render.progress(quiet=quiet) as progress:
        if apply is not None:
            check_given(
                {"--layer": layer, "--data": data, **others, "--covariance-out": covariance_out}, {"-o": output}, of="--apply"
            )
            outcome = apply_deltas(
                checkpoint,
                apply,
                cast("Path", output),
                Rounded(round_, seed),
                overwrite=overwrite,
                num_threads=num_threads,
                progress=progress,
            )
        elif covariance_out is not None:
            check_given({"-o": output, **others}, {"--layer": layer, "--data": data}, of="--covariance-out")
            outcome = covariance_of(
                checkpoint, layer or (), cast("Path", data), covariance_out, is_transposed=transposed, overwrite=overwrite
            )
        else:
            check_given({}, {"--layer": layer, "--data": data, "--loss": loss}, of="tune")
            request = TuneRequest(
                checkpoint,
                tuple(layer or ()),
                cast("Path", data),
                cast("LossName", loss),
                tuple(bias or ()),
                cast("tuple[ActivationName, ...]", tuple(activation or ())),
                head,
                head_bias,
                transposed,
                anchor,
                anchor_weight,
                covariance,
                val,
                Settings(method_named(tune_method), iterations, rate, momentum, weight_decay, ridge),
                gate=gate,
                subsample=subsample,
                rounded=Rounded(round_, seed),
                output=output,
                delta_out=delta_out,
                lora_out=lora_out,
                overwrite=overwrite,
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
