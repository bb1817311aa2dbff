"""The options that commands share, where their values may come from, and what their texts mean."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand

from farcast_cli.choices import (
    ActivationName,
    ClockName,
    Io,
    LossName,
    OptimizerMode,
    OutputDType,
    OutputLayout,
    Purpose,
    Ranks,
    Rounding,
    Scope,
    SolverName,
    StepFrom,
    StepNorm,
    StepUnit,
)
from farcast_cli.commands.mistakes import nearest, refuse_more, resolve_addresses, unknown_variables
from farcast_cli.errors import ANY_COMMAND, FarcastError, UsageError, shell_word
from farcast_cli.settings import MIN_SAMPLE, check_choice, env

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIG_FILE = Path("farcast.toml")
"""Read where it lies in the working directory, though nobody named it. It may have come with a download."""
FROM_ANY_FILE = frozenset(
    {
        *("include", "exclude", "pattern", "weights"),  # which tensors, and which entries of the folder that the user named
        "unit",  # what the run's steps are called; known steps refuse another
        *("horizon", "to_step", "origin", "method", "scope", "clock"),  # judged by the back-test
        *("grad_weight", "sample", "full", "sampled"),
        *("optimizer", "dtype", "layout", "max_shard_size"),  # what is written where the user says
        *("layer", "bias", "loss", "activation", "head", "head_bias", "transposed"),
        *("tune_method", "iterations", "rate", "momentum", "weight_decay", "ridge", "round_"),  # judged by the gate
        *("device", "threads", "jobs", "eval_timeout", "dry_run", "json_", "quiet", "verbose"),
        *("form", "text"),  # in which a report is printed
        *("once", "interval", "until", "keep"),  # how long a run is watched, and how much of it is kept
    }
)
"""The options that a file which nobody named may set. All others need a file that the user named.

None of these names a place to read or to write, runs a program, or weakens a check. `steps` reads across a leap, `step_from` lets evidence contradict, `purpose`
and `counters` skip the ledger or the run's end, `scale` and `step_norm` write another step than the back-test judges, `gain`, `max_gain` and `every` a longer leap, `io`
may map files, `maximize` turns the judgement round; `subsample` and `seed` choose the rows that judge.
"""
PANELS = {
    "Input": (
        "forecaster",
        "include",
        "exclude",
        "steps",
        "pattern",
        "step_from",
        "unit",
        "weights",
        "history",
        "sampled",
        "last",
        "sample",
        "full",
        "losses",
        "against",
        "reference",
    ),
    "Horizon": ("horizon", "to_step", "origin", "every", "purpose"),
    "Watch": ("interval", "until", "once", "keep", "leap", "on_leap"),
    "Method": ("method", "step_norm", "scale", "scope", "clock", "grad_weight", "gain", "max_gain"),
    "Layer": ("layer", "bias", "activation", "head", "head_bias", "transposed"),
    "Rows": ("data", "loss", "anchor", "anchor_weight", "covariance", "val", "gate", "subsample", "seed"),
    "Solver": ("tune_method", "iterations", "rate", "momentum", "weight_decay", "ridge"),
    "Trainer state": ("optimizer", "counters"),
    "Evaluation": ("eval_cmd", "maximize", "jobs", "eval_timeout"),
    "Output": (
        *(
            "output",
            "place",
            "into",
            "form",
            "text",
            "dtype",
            "layout",
            "max_shard_size",
            "round_",
            "delta_out",
            "lora_out",
            "covariance_out",
            "apply",
            "even_if_worse",
            "overwrite",
        ),
        *("ledger", "log_to", "dry_run", "json_", "quiet", "verbose"),
    ),
    "Machine": ("device", "threads", "io", "ranks", "ranks_timeout", "config"),
}
"""The groups in which `--help` shows the options of a command, in this order."""
MAX_CONFIG_BYTES = 1 << 20


@dataclass(slots=True)
class Asked:
    """What a command line asks for, as far as it has been read; its errors are answered in that form."""

    json: bool = False
    rank: int = 0
    """Of several processes that do this together: the first one alone prints results."""

    def read(self, context: Any) -> None:
        """Follow the options of a command, or the file of defaults if they could not be read."""
        defaults = getattr(context, "default_map", None) or {}
        self.json = bool(context.params.get("json_", self.json or bool(defaults.get("json_"))))


def asked_by(arguments: Sequence[str], environment: Mapping[str, str]) -> Asked:
    """What a command line asks for by its looks, before it is read."""
    options = itertools.takewhile(lambda word: word != "--", arguments)
    return Asked("--json" in options or environment.get(env("JSON"), "").lower() in {"1", "true", "t", "yes", "y", "on"})


class Grouped(TyperCommand):
    """A command whose help shows its options by `PANELS`."""

    def __init__(self, *args: Any, params: list[Any], **options: Any) -> None:
        places = {name: (number, panel) for number, (panel, names) in enumerate(PANELS.items()) for name in names}
        known = [parameter for parameter in params if parameter.name in places]
        for parameter in known:
            parameter.rich_help_panel = places[parameter.name][1]
        known.sort(key=lambda parameter: places[parameter.name][0])
        super().__init__(*args, params=[*(p for p in params if p not in known), *known], **options)
        self.allow_extra_args = True  # what is too many, `parse_args` says itself

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            UsageError: more arguments than the command takes, or an address in place of a path.
        """
        try:
            super().parse_args(ctx, args)
        finally:
            if isinstance(ctx.obj, Asked):
                ctx.obj.read(ctx)
        if ctx.resilient_parsing:  # for the completion of a line that is not finished
            return args
        refuse_more(ctx)
        resolve_addresses(ctx)
        if strangers := [] if ctx.params.get("quiet") else unknown_variables(ctx):
            from farcast_cli.commands import render

            for text in strangers:
                render.note(text)
        return args

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a hint to call it with another folder names the command."""
        try:
            return super().invoke(ctx)
        except FarcastError as error:
            error.hint = error.hint.replace(ANY_COMMAND, f"farcast {ctx.info_name} ", 1)
            raise


def _commands(context: typer.Context) -> list[Any]:
    """All commands beside the one that is run."""
    group: Any = context.parent.command if context.parent else None
    return list(group.commands.values()) if group is not None else [context.command]


def load_config(context: typer.Context, value: Path | None) -> Path | None:
    """Defaults from a TOML file: keys at the top for every command, tables for one.

    Raises:
        UsageError: the file cannot be read, or sets what it may not.
    """
    path = value or CONFIG_FILE
    if value is None and not path.is_file():
        return None
    content = _read_toml(path)
    own = content.get(context.info_name or "", {})
    if not isinstance(own, dict):
        raise UsageError(f"{path}: {context.info_name} = {own!r}: expected a table, [{context.info_name}]")
    if context.info_name == "tune" and "method" in own:  # its methods are others than predict's
        own = {("tune_method" if key == "method" else key): item for key, item in own.items()}
    shared = {key: item for key, item in content.items() if not isinstance(item, dict)}
    tables = sorted(content.keys() - shared.keys() - {command.name for command in _commands(context)})
    if tables:
        likely = nearest(tables[0], [str(command.name) for command in _commands(context)])
        raise UsageError(f"{path}: expected the name of a command as table, found {tables[0]!r}{likely}", hint="farcast --help")
    known = {parameter.name for parameter in context.command.params}
    anywhere = {parameter.name for command in _commands(context) for parameter in command.params}
    strangers = sorted(key for key in shared if _option_of(key) not in anywhere)
    if strangers:
        likely = nearest(strangers[0], map(key_of, anywhere))
        raise UsageError(f"{path}: no command has an option {strangers[0]!r}{likely}", hint="farcast --help")
    unknown = sorted(key for key in own if _option_of(key) not in known)
    if unknown:
        likely = nearest(unknown[0], map(key_of, known))
        raise UsageError(
            f"{path}: [{context.info_name}] has no option {unknown[0]!r}{likely}", hint=f"farcast {context.info_name} --help"
        )
    refused = sorted(key for key in shared | own if _option_of(key) not in FROM_ANY_FILE)
    if value is None and refused:  # whoever made this folder would choose what is read, written or run, and what is checked
        raise UsageError(
            f"{path}: cannot set {refused[0]!r}, because no --config names this file", hint=f"--config {shell_word(path)}"
        )
    several = {parameter.name for parameter in context.command.params if getattr(parameter, "multiple", False)}
    context.default_map = {_option_of(key): _default(key, item, several) for key, item in (shared | own).items()}
    return path


def _default(key: str, item: Any, several: set[str]) -> Any:
    """A value of the file as typer takes it: horizons in one text, one pattern as a list of one."""
    if isinstance(item, list) and key == "horizon":
        return ",".join(map(str, item))
    return [item] if isinstance(item, str) and _option_of(key) in several else item


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: expected a TOML file, found none")
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        if len(raw) > MAX_CONFIG_BYTES:
            raise UsageError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes: expected a few options")
        return tomllib.loads(raw.decode())
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not a readable TOML file: {error}") from error


def _option_of(key: str) -> str:
    """The parameter that a key of the file stands for."""
    return {"for": "purpose", "format": "form", "json": "json_", "round": "round_"}.get(key, key.replace("-", "_"))


def key_of(option: str) -> str:
    """The key of the file that stands for a parameter."""
    return {"purpose": "for", "form": "format", "json_": "json", "round_": "round"}.get(option, option)


def choice(allowed: Any, name: str, *, env_name: str | None = None, text: str, hint: str = "") -> Any:
    """An option whose value is one of a Literal type: its help shows which, and another value is a usage error.

    Wherever the value comes from: the command line, the environment or a file. The message is farcast's own, since those of
    typer's versions differ.
    """
    names = get_args(allowed)

    def parse(value: str) -> str:
        check_choice(name, value, allowed, hint=hint)
        return value

    envvar = env(env_name or name.removeprefix("--").replace("-", "_").upper())
    return typer.Option(
        name, envvar=envvar, metavar="|".join(names), parser=parse, autocompletion=lambda: list(names), help=text
    )


JsonOption = Annotated[bool, typer.Option("--json", envvar=env("JSON"), help="Print one JSON object on stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", envvar=env("QUIET"), help="Print only errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", envvar=env("VERBOSE"), help="Print more details on stderr.")]
DeviceOption = Annotated[
    str, typer.Option(envvar=env("DEVICE"), metavar="auto|cpu|cuda[:N]", help="Device that computes; auto is the CPU.")
]
ThreadsOption = Annotated[
    int, typer.Option(envvar=env("THREADS"), min=0, help="Number of workers that read and compute; 0: one per core, at most 8.")
]
IoOption = Annotated[
    Io,
    choice(
        Io,
        "--io",
        text="auto writes past the page cache if the filesystem supports it; pread never does; mmap reads files in place, but"
        " the process dies if a file is truncated meanwhile or the disk fails.",
    ),
]
RanksOption = Annotated[
    Ranks,
    choice(
        Ranks,
        "--ranks",
        text="env lets the processes of a launcher (torchrun, srun, mpirun) share the work of one call; its variables say which"
        " this is. off works alone.",
    ),
]
RanksTimeoutOption = Annotated[
    float,
    typer.Option(
        envvar=env("RANKS_TIMEOUT"),
        metavar="SECONDS",
        help="How long a rank waits for another that says nothing before it stops.",
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        envvar=env("CONFIG"),
        callback=load_config,
        is_eager=True,
        metavar="FILE",
        help="TOML file with defaults for these options. Without it, ./farcast.toml may set some of them.",
    ),
]
ForecasterOption = Annotated[
    Path, typer.Option(envvar=env("FORECASTER"), metavar="FILE", help="The forecaster file that fit wrote.")
]
IncludeOption = Annotated[
    list[str] | None, typer.Option(envvar=env("INCLUDE"), metavar="GLOB", help="Forecast only tensors with these names.")
]
ExcludeOption = Annotated[
    list[str] | None,
    typer.Option(envvar=env("EXCLUDE"), metavar="GLOB", help="Copy tensors with these names instead of forecasting them."),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        envvar=env("STEPS"),
        metavar="FROM:TO:EVERY|N,N",
        help="FROM:TO:EVERY takes the snapshots from step FROM to step TO at multiples of EVERY; each part is optional. A list takes exactly"
        " these; if the files do not contain their step, the list assigns it, oldest file first.",
    ),
]
PatternOption = Annotated[
    str | None,
    typer.Option(
        envvar=env("PATTERN"), metavar="GLOB", help="Read only entries with matching names; for a folder with several runs."
    ),
]
StepFromOption = Annotated[
    StepFrom | None,
    choice(
        StepFrom,
        "--step-from",
        text="Evidence that tells the steps, where evidence disagrees: the names, Adam's count, the counter in the files, the"
        " metadata, or the trainer's state. By default farcast chooses, and stops if it cannot.",
    ),
]
UnitOption = Annotated[
    StepUnit,
    choice(
        StepUnit,
        "--unit",
        text="What the steps of the run count. epoch is for a run of which only the epochs are known; horizons then are epochs.",
    ),
]
PlaceOption = Annotated[
    str | None,
    typer.Option(
        envvar=env("PLACE"),
        metavar="NAME",
        help="Write the checkpoint's file under this name into a folder of its own, and print the folder: for a trainer that"
        " resumes from a folder, such as nanoGPT with ckpt.pt.",
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        envvar=env("WEIGHTS"),
        metavar="KEY[,KEY...]",
        help="Keys of the networks to forecast in a torch file, such as g,d or state.model. By default all that are found.",
    ),
]
HistoryOption = Annotated[
    Path | None,
    typer.Option(
        envvar=env("HISTORY"),
        metavar="FOLDER",
        help="Folder of the snapshots that farcast keep copied; they stand before the run's own. Default: kept/NAME.",
    ),
]
SampleOption = Annotated[
    int, typer.Option(envvar=env("SAMPLE"), min=MIN_SAMPLE, help="Number of values to read from each tensor.")
]
LedgerOption = Annotated[
    Path,
    typer.Option(
        envvar=env("LEDGER"), metavar="FILE", help="File in which predict records the checkpoints to resume from; fit reads it."
    ),
]
LossesOption = Annotated[
    Path | None,
    typer.Option(
        "--losses",
        envvar=env("LOSSES"),
        metavar="FILE",
        help="The run's log of losses: CSV, JSON lines or TensorBoard; by default where its trainer keeps it.",
    ),
]
LogToOption = Annotated[
    list[str] | None,
    typer.Option(
        "--log-to",
        envvar=env("LOG_TO"),
        metavar="KIND:PLACE",
        help="Also log the numbers of the answer, at the origin's step: jsonl:PATH, tensorboard:DIR, wandb[:PROJECT] or mlflow[:URI].",
    ),
]
FullOption = Annotated[bool, typer.Option("--full", envvar=env("FULL"), help="Read all values instead of a sample.")]
MethodOption = Annotated[
    str | None,
    typer.Option(
        envvar=env("METHOD"), metavar="NAME", help="Forecasting method (backtest -v lists them); auto chooses it by evidence."
    ),
]
PurposeOption = Annotated[
    Purpose, choice(Purpose, "--for", text="Purpose of the forecast: resume training from it, or evaluate and ship it.")
]
StepNormOption = Annotated[
    StepNorm | None,
    choice(StepNorm, "--step-norm", text="Rule for the norm of each tensor's update; by default the method's own."),
]
ScopeOption = Annotated[
    Scope, choice(Scope, "--scope", text="Fit each tensor separately, or all tensors together (for methods that fit).")
]
ClockOption = Annotated[
    ClockName | None,
    choice(
        ClockName,
        "--clock",
        text="Unit of lengths and of b: steps, or learning rate summed over the steps. Default: rate if it is known; an update to"
        " resume from then keeps its full length while enough of the schedule is left.",
    ),
]
LayoutOption = Annotated[
    OutputLayout,
    choice(
        OutputLayout,
        "--layout",
        text="File format of the output. A format other than the run's own may keep the weights only.",
    ),
]
GradWeightOption = Annotated[
    float, typer.Option(envvar=env("GRAD_WEIGHT"), min=0, help="Weight of the regulariser L_grad of lfd2.")
]

JobsOption = Annotated[
    int,
    typer.Option(
        envvar=env("JOBS"), min=1, help="Number of parallel runs of --eval-cmd; each needs its own checkpoint on disk."
    ),
]
EvalTimeoutOption = Annotated[
    float | None,
    typer.Option(
        envvar=env("EVAL_TIMEOUT"),
        metavar="SECONDS",
        help="Time limit for one run of --eval-cmd; farcast then kills it and stops.",
    ),
]

MaximizeOption = Annotated[bool, typer.Option("--maximize", envvar=env("MAXIMIZE"), help="A larger score is better.")]
OptimizerOption = Annotated[OptimizerMode, choice(OptimizerMode, "--optimizer", text="How to write the optimiser's state.")]
DTypeOption = Annotated[OutputDType, choice(OutputDType, "--dtype", text="Element type of the output.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", envvar=env("OVERWRITE"), help="Replace an earlier output of farcast with the same name.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", envvar=env("DRY_RUN"), help="Write nothing; print what would be written, and its cost.")
]

RowsOption = Annotated[
    Path | None,
    typer.Option(
        envvar=env("DATA"),
        metavar="FILE",
        help="A .safetensors, .npz or .pt file with x (inputs of the layer) and y (targets or labels). It may also hold out (the"
        " model's outputs for these rows, which check the description), w (weights of rows) and groups (rows that belong together).",
    ),
]
LayersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer", envvar=env("LAYER"), metavar="KEY", help="Name of the weight to tune; give several in forward order."
    ),
]
BiasesOption = Annotated[
    list[str] | None,
    typer.Option("--bias", envvar=env("BIAS"), metavar="KEY", help="Name of its bias, which is tuned too; one for each layer."),
]
ActivationsOption = Annotated[
    list[str] | None,
    choice(
        ActivationName,
        "--activation",
        text="Activation after the layer; one for all layers, or one for each. Needed with --head; gelu-tanh is GPT-2's gelu_new.",
    ),
]
TuneMethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        envvar=env("TUNE_METHOD"),
        metavar="|".join(get_args(SolverName)),
        autocompletion=lambda: list(get_args(SolverName)),
        help="Solver. Default: gauss-newton.",
    ),
]
LossOption = Annotated[
    LossName | None, choice(LossName, "--loss", text="Loss to minimise: mse for targets, cross-entropy for labels.")
]
RoundOption = Annotated[Rounding, choice(Rounding, "--round", text="How to round values to the stored type.")]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line; neither the environment nor a file gave it."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
