"""Write docs/cli.md from the command line itself, so that the reference cannot drift from the program.

    python docs/build_cli_reference.py            write it
    python docs/build_cli_reference.py --check    exit 1 where it is stale

Options come from the parser, exit codes from the exception tree, JSON keys from the functions that build the objects.
The meaning of each JSON key stands here; a key without one, or a meaning without a key, is an error.
"""
# ruff: noqa: INP001 - a script beside the pages that it makes

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from farcast_cli import errors, leap_command, render
from farcast_cli.cli import app
from farcast_cli.options import FROM_ANY_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE = Path(__file__).with_name("cli.md")
REBUILD = "python docs/build_cli_reference.py"

SIGNIFICANCE = "p of S: how often chance alone would give as much; `null` where S cannot be had"
FORECAST_KEYS = {
    "path": "where the forecast is; `null` where none was written",
    "origin_step": "step of the last snapshot that the forecast saw",
    "valid_step": "step that the forecast is for: origin step + horizon",
    "horizon": "steps from the origin to the forecast",
    "method": "name of the method",
    "ratio": "back-test ratio b; `null` where it cannot be had",
    "expected_ratio": "the same back-test of the step as it is written, not clipped",
    "coherence": "coherence S of the run's drift; `null` where it cannot be had",
    "recent_coherence": "coherence of the recent half of the history; `null` where it holds too few snapshots",
    "clock": "what b is measured in: `rate`, learning rate summed over the steps, or `steps`",
    "pace_ahead": "mean learning rate over the horizon against that of the stretch before it; 1 where steps are counted",
    "length_factor": "what the step's length was multiplied by: `pace_ahead`, or 1 where it keeps its full length",
    "significance": SIGNIFICANCE,
    "chosen": "what was chosen for you (horizon, method) and why, in words; empty where nothing was",
    "verdict": "`forecast`, `abstain` or `untestable`",
    "reason": "the verdict's reason, for people",
    "num_forecast": "tensors that were forecast",
    "num_copied": "tensors that were copied from the origin",
    "unchanged_share": "share of the forecast values that equal the origin's after rounding (not measured by `--dry-run`)",
    "bytes_read": "bytes read from the snapshots",
    "bytes_written": "bytes written, for this horizon",
    "seconds": "seconds the pass took",
    "changes": "what was rewritten for resuming, as `where: old -> new`",
    "notes": "what could not be moved on exactly, and what was left out",
    "evaluations": "with `--eval-cmd`: one entry per trial",
    "evaluations[].strength": "factor on the step; 0 is the origin itself",
    "evaluations[].value": "the number that the command printed last",
    "evaluations[].seconds": "seconds that the command took",
    "evaluations[].log": "the file with its output",
}

JSON_KEYS: dict[str, dict[str, str]] = {
    "inspect": {
        "layout": "name of the layout, see [formats](formats.md)",
        "snapshots": "one entry per snapshot, in the order of their steps",
        "snapshots[].path": "the file or folder",
        "snapshots[].step": "the step that was settled on; `null` where nothing tells it",
        "snapshots[].step_source": "which evidence settled it: `trainer state`, `payload`, `adam step`, `name`, `metadata`,"
        " or `order` where `--steps` listed the steps",
        "snapshots[].bytes": "size of all its files",
        "snapshots[].evidence": "every place that names a step, the most trusted first",
        "snapshots[].evidence[].source": "kind of evidence",
        "snapshots[].evidence[].where": "file or key",
        "snapshots[].evidence[].step": "the step that it names",
        "num_tensors": "tensors that would be forecast",
        "num_parameters": "values in them",
        "copied": "tensors that would be copied",
        "copied[].name": "tensor name",
        "copied[].reason": "why it is copied",
        "ignored": "entries of the folder that are not part of the run",
        "ignored[].path": "the file or folder",
        "ignored[].reason": "why it is left out",
        "notes": "what is odd but no problem, such as names that count in a unit of their own",
        "problems": "what a person should look at; empty where all is well",
    },
    "fit": {
        "forecaster": "the file that was written",
        "origin_step": "step of the last snapshot",
        "num_snapshots": "snapshots that were read",
        "leap": "the step of the leap after which the history begins; `null` where the run has made none",
        "notes": "what was said of the run, such as where its history begins because its tensors changed",
        "num_tensors": "tensors that can be forecast",
        "sampled": "values read of each tensor at most; `null` with `--full`",
        "coherence": "coherence S of the run's drift; `null` where it cannot be had",
        "recent_coherence": "coherence of the recent half of the history; `null` where it holds too few snapshots",
        "significance": SIGNIFICANCE,
        "bytes_read": "bytes read",
        "seconds": "seconds it took",
    },
    "backtest": {
        "origin_step": "step of the last snapshot",
        "coherence": "coherence S of the run's drift; `null` where it cannot be had",
        "clock": "what b is measured in: `rate`, learning rate summed over the steps, or `steps`",
        "significance": SIGNIFICANCE,
        "scores": "one entry per method and horizon that the history can test",
        "scores[].method": "name of the method",
        "scores[].horizon": "steps ahead",
        "scores[].ratio": "back-test ratio b, on the clipped step",
        "scores[].ratio_as_written": "the same for the step as the method writes it by default",
        "best": "the score with the smallest b; `null` where nothing could be tested",
        "best.method": "name of the method",
        "best.horizon": "steps ahead",
        "best.ratio": "back-test ratio b",
        "verdict": "`forecast`, `abstain` or `untestable`; an object from horizon to verdict where there are several horizons",
        "decisions": "one entry per horizon",
        "decisions[].horizon": "steps ahead",
        "decisions[].method": "the method that was asked for, or chosen",
        "decisions[].verdict": "`forecast`, `abstain` or `untestable`",
        "decisions[].ratio": "its back-test ratio b",
        "decisions[].recent_coherence": "coherence of the recent half of the history",
        "decisions[].reason": "why",
    },
    "predict": FORECAST_KEYS
    | {
        "forecasts": "with several horizons: one object per horizon with the keys above, in place of them",
        "dry_run": "`true` with `--dry-run`; absent otherwise",
    },
    "verify": {
        "ratio": "error of the forecast against that of the reference: 0 perfect, 1 no better; `null` where nothing moved",
        "mean_absolute_error": "of the forecast, over all compared values",
        "reference": "the checkpoint that the forecast was compared with",
        "clock": "what `trained` is measured in: `rate`, learning rate summed over the steps, or `steps`",
        "trained": "how much of the forecast's stretch the truth was trained on; 1 where both are of one step, `null` where a step is unknown",
        "per_tensor": "one entry per tensor",
        "per_tensor[].name": "tensor name",
        "per_tensor[].ratio": "its ratio; `null` where it did not move",
    },
}
JSON_KEYS["leap"] = {
    "path": "the checkpoint to resume from; `null` where there is no leap",
    "origin": "the newest snapshot; go on from it where there is no leap",
    "origin_step": "step of the newest snapshot, from which the leap begins",
    "horizon": "steps that the leap is worth at the run's own pace: gain times `every`; 0 without a leap",
    "verdict": "`forecast` or `abstain`",
    "reason": "the verdict's reason, for people",
    "gain": "stretches that a leap goes ahead, after this call",
    "share": "of the move that the memory foretold, what the last stretches made; `null` where nothing was foretold yet",
    "cosine": "between the last stretch's move and the one that was foretold; `null` where nothing was",
    "loss_signal": "with `--eval-cmd`: of the loss's usual change from call to call, what a stretch more would lower it by,"
    " from -1 to 1; `null` where it is not known yet",
    "stretches": "stretches that are remembered",
    "clock": "what the lengths of stretches are measured in: `rate` or `steps`",
    "every": "steps until the next leap, as it was reckoned with",
    "again": "`true` where no training has happened since the last call: its answer, said again",
    "unchanged_share": "share of the values that equal the origin's after rounding",
    "changes": "what was rewritten for resuming, as `where: old -> new`",
    "notes": "what a person should know, such as a memory that starts again, and why",
    "evaluations": "with `--eval-cmd`: one entry per run of the command",
    "evaluations[].strength": "how far ahead the weights were, in stretches; below 0 it is behind",
    "evaluations[].value": "the number that the command printed last",
    "evaluations[].seconds": "seconds that the command took",
    "dry_run": "`true` with `--dry-run`; absent otherwise",
}
JSON_KEYS["tune"] = {
    "path": "what was written; `null` where the gate was against it",
    "layers": "the layers that were tuned",
    "method": "name of the method, or `apply`",
    "verdict": "`tuned`, `no significant gain`, or `applied`",
    "held_out_before": "mean loss of the held-out rows, before; `null` with `--apply`",
    "held_out_after": "the same, after",
    "z": "standard errors that the gain on them is from 0",
    "tuned_before": "mean loss of the rows tuned on, before",
    "tuned_after": "the same, after",
    "num_rows": "rows tuned on, rows that stop it early, rows held out",
    "iterations": "after how many the early-stopping rows were best",
    "relative_change": "norm of each layer's change against the layer's own",
    "passes": "over the weights, while tuning",
    "bytes_read": "bytes of weights read: to tune, to write, to check",
    "bytes_written": "bytes written",
    "seconds": "seconds it took",
    "notes": "what is odd, such as rows that repeat, or a cache that did not pay",
}
BUILDERS = {
    "inspect": (render.inspect_json,),
    "fit": (render.fit_json,),
    "backtest": (render.backtest_json,),
    "predict": (render.outcome_json, render.predict_json),
    "verify": (render.verify_json,),
    "leap": (leap_command.leap_json,),
    "tune": (render.tune_json,),
}

KEYS = sorted({"json_": "json", "round_": "round"}.get(name, name) for name in FROM_ANY_FILE)

HEADER = f"""\
# Command line

<!-- Made by {REBUILD.removeprefix("python ")}; change the program or that script, not this page. -->
"""

CONFIG = f"""\
## Defaults from the environment and from a file

Every option that has an environment variable takes its default from there. A flag is set by `1` or `true`. `--include`
and `--exclude` take several patterns from one variable, separated by blanks.

`--config FILE`, or a `farcast.toml` in the working directory, sets defaults too. Keys at the top hold for every command,
a table holds for one command. The command line wins over the environment, and the environment over the file.

A `farcast.toml` that merely lies there may have come with a download. It may set {", ".join(f"`{key}`" for key in KEYS)}.
Every other key ends the command with exit code 2: it would choose what is read, written or run, or weaken a check. Name
the file to have it obeyed as a whole: `--config farcast.toml`, or `FARCAST_CONFIG=farcast.toml`.

```toml
threads = 4

[fit]
exclude = ["*.embed_tokens.*"]

[predict]
horizon = [500, 1000]
method = "blend"
```
"""

OUTPUT = """\
## What goes where

stdout carries the result and nothing else: the path that `fit`, `predict` or `leap` wrote, a table, or one JSON object. Progress,
notes and errors go to stderr. Bars and colour appear on a terminal only; `NO_COLOR` is honoured. Nothing ever prompts.

Where stdout is full (a disk, `/dev/full`), the exit code is 5 and stderr says so; the files that the command wrote are whole
and in their places. A reader that goes away, as in `| head`, changes nothing: the exit code is the command's own. A stream
that is closed from the start (`>&-`) takes everything, like `/dev/null`. What stderr does not take changes nothing.

A path goes into a pipe or a file as the very bytes of the file's name, so that `$(farcast predict)` works in any locale. On a
terminal, characters that it would obey are shown escaped. A path with a newline in it is escaped everywhere, with a note on
stderr; `--json` has it as it is. In JSON, a byte of a name that is no UTF-8 is written as `\\udc80` to `\\udcff` (the
byte plus 0xDC00), as Python spells it; so it is in the ledger, the sidecar and the forecaster.
"""

JSON_INTRODUCTION = f"""\
With `--json`, a command prints one object on stdout. Every object also has `schema_version`, the number
{render.SCHEMA_VERSION}. Keys may be added; none is renamed or removed while that number stays.
"""


def reference() -> str:
    """The whole page as markdown; independent of the terminal."""
    group: Any = typer.main.get_command(app)
    commands = [_command(name, command) for name, command in group.commands.items() if not command.hidden]
    start = _paragraphs(group.help) + "\n" + _options([p for p in group.params if _is_option(p)])
    return "\n".join([HEADER, start, *commands, CONFIG, OUTPUT, _exit_codes(), _json_keys()])


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with --check compare it."""
    text = reference()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"docs/{PAGE.name} is stale: {REBUILD}\n")
    return 1


# --- commands --------------------------------------------------------------------------------------------------------


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if not _is_option(p)]
    options = [p for p in command.params if _is_option(p)]
    usage = " ".join(["farcast", name, "[OPTIONS]", *(_argument_name(p) for p in arguments)])
    parts = [f"## farcast {name}\n", f"`{usage}`\n", _paragraphs(command.help)]
    if arguments:
        rows = [(_code(_argument_name(p)), p.help or "") for p in arguments]
        parts.append(_table(("argument", "meaning"), rows))
    parts += [_options(options), _examples(command.epilog or "")]
    return "\n".join(parts)


def _paragraphs(text: str) -> str:
    """Help text as markdown: indented lines (a command, blanks, what it does) become a fenced block with comments."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        if all(line.startswith("  ") for line in lines):
            pairs = [(command, what.strip()) for command, _, what in (line.strip().partition("  ") for line in lines)]
            found.append(_fence([f"{command}  # {what}" if what else command for command, what in pairs]))
        else:
            found.append(block + "\n")
    return "\n".join(found)


def _examples(epilog: str) -> str:
    label, colon, text = epilog.partition(":")
    if not colon or not label.startswith("Example"):
        return epilog
    return _fence([example.strip() for example in text.split("   |   ")])


def _is_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option")


def _argument_name(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper()).strip("[]")
    return name if parameter.required else f"[{name}]"


def _options(options: Sequence[Any]) -> str:
    rows = []
    for option in options:
        names = ", ".join(_code(name) for name in [*option.opts, *option.secondary_opts])
        value = "" if option.is_flag else " " + _code(_placeholder(option))
        meaning = " ".join(filter(None, [option.help, _limits(option)]))
        rows.append((names + value, _default(option), _code(option.envvar) if option.envvar else "", meaning))
    return _table(("option", "default", "environment", "meaning"), rows)


def _placeholder(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    return {int: "N", float: "X"}.get(type(option.default), "VALUE")


def _limits(option: Any) -> str:
    smallest = getattr(option, "min", None)
    if smallest is None:
        smallest = getattr(getattr(option, "type", None), "min", None)
    repeated = "May be given several times." if option.multiple else ""
    return f"At least {smallest:g}." if smallest is not None else repeated


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default
    if option.is_flag:
        return "off"
    return _code(str(value)) if isinstance(value, (str, int, float, Path)) else ""


# --- exit codes and JSON ---------------------------------------------------------------------------------------------


def _exit_codes() -> str:
    rows = [("0", "Done."), ("1", "A bug in farcast: every problem that a user can cause has a code of its own.")]
    for kind in errors.FarcastError.__subclasses__():
        more = [_sentence(inner) for inner in kind.__subclasses__()]
        rows.append((str(kind.exit_code), " ".join([_sentence(kind), *more])))
    rows.append(
        (
            "130",
            "Interrupted (SIGINT, SIGTERM or SIGHUP). Nothing was published; an interrupt that comes when the outputs have their names is too late, and the code is 0.",
        )
    )
    return "## Exit codes\n\n" + _table(("code", "meaning"), rows)


def _sentence(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def _json_keys() -> str:
    parts = [
        "## JSON\n",
        JSON_INTRODUCTION,
    ]
    for command, builders in BUILDERS.items():
        found = [key for builder in builders for key in _keys_built_by(builder)]
        _check_meanings(command, found)
        rows = [(_code(key), JSON_KEYS[command][key]) for key in found]
        parts += [f"### farcast {command} --json\n", _table(("key", "meaning"), rows)]
    return "\n".join(parts)


def _check_meanings(command: str, found: Sequence[str]) -> None:
    odd = sorted(set(found) ^ JSON_KEYS[command].keys())
    if odd:
        raise SystemExit(f"docs/build_cli_reference.py: JSON_KEYS[{command!r}] and farcast_cli/render.py differ in {odd}")


def _keys_built_by(function: Any) -> list[str]:
    tree = ast.parse(inspect.getsource(function))
    return list(_outermost(tree, ""))


def _outermost(node: ast.AST, prefix: str) -> Iterator[str]:
    """The keys of the dicts that a piece of code builds, those of nested ones with their path."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
        index = node.targets[0].slice
        if isinstance(index, ast.Constant):
            yield str(index.value)
            yield from _outermost(node.value, str(index.value))
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                path = ".".join(filter(None, [prefix, str(key.value)]))
                yield path
                yield from _outermost(value, path)
    elif isinstance(node, ast.ListComp):
        yield from _outermost(node.elt, f"{prefix}[]" if prefix else "")
    elif not isinstance(node, (ast.DictComp, ast.arguments)):
        for child in ast.iter_child_nodes(node):
            yield from _outermost(child, prefix)


# --- markdown --------------------------------------------------------------------------------------------------------


def _code(text: str) -> str:
    return f"`{text}`"


def _fence(lines: Sequence[str]) -> str:
    return "\n".join(["```sh", *lines, "```", ""])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
