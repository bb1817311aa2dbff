"""Write docs/cli.md and docs/json.md from the program itself, so that the reference cannot drift from it.

    python docs/build_cli_reference.py            write them
    python docs/build_cli_reference.py --check    exit 1 where one is stale

Options come from the parser, exit codes from the exception tree, JSON keys with their meaning from the JSON schema.
"""
# ruff: noqa: INP001 - a script beside the pages that it makes

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from farcast_cli import errors
from farcast_cli.cli import app
from farcast_cli.commands.options import FROM_ANY_FILE, key_of
from farcast_cli.results import ANSWERS, schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLDER = Path(__file__).parent
REBUILD = "python docs/build_cli_reference.py"

KEYS = sorted(map(key_of, FROM_ANY_FILE))

MADE = f"<!-- Made by {REBUILD.removeprefix('python ')}; change the program or that script, not this page. -->\n"

CONFIG = f"""\
## Defaults from the environment and from a file

Every option that has an environment variable takes its default from there. A flag is set by `1` or `true`. `--include`,
`--exclude` and `--log-to` take several values from one variable, separated by blanks. A variable `FARCAST_...` that belongs to no option is named
on stderr with the nearest one.

`--config FILE`, or a `farcast.toml` in the working directory, sets defaults too. Keys at the top hold for every command,
a table holds for one command. A key that no command has is a usage error. The command line wins over the environment, and the environment over the file.

A `farcast.toml` that merely lies there may have come with a download. It may set {", ".join(f"`{key}`" for key in KEYS)}.
Every other key ends the command with exit code 2: it would choose what is read, written or run, or weaken a check. Name
the file to have it obeyed as a whole: `--config farcast.toml`, or `FARCAST_CONFIG=farcast.toml`.

`FARCAST_STATE_DIR` names the folder of the second ledgers, by default `$XDG_STATE_HOME/farcast` or `~/.local/state/farcast`.
`FARCAST_CACHE_DIR` names the folder for the files of [remote runs](remote.md), by default `~/.cache/farcast/remote`.
An empty value switches them off. See [what is written where](guarantees.md#what-is-written-where). `FARCAST_ENGINE` is `native`
or `numpy`: see [how the engine computes](performance.md#how-it-works).

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

stdout carries the result and nothing else: the path that `fit`, `predict` or `leap` wrote, a table, the verdicts of `watch`, or
one JSON object. Progress, notes and errors go to stderr. Bars and colour appear on a terminal only; `NO_COLOR` is honoured. Nothing ever prompts.

Where stdout is full (a disk, `/dev/full`), the exit code is 5 and stderr says so; the files that the command wrote are whole
and in their places. A reader that goes away, as in `| head`, changes nothing: the exit code is the command's own. A stream
that is closed from the start (`>&-`) takes everything, like `/dev/null`. What stderr does not take changes nothing.

A path goes into a pipe or a file as the very bytes of the file's name, so that `$(farcast predict)` works in any locale. On a
terminal, characters that it would obey are shown escaped. A path with a newline in it is escaped everywhere, with a note on
stderr; `--json` has it as it is. In JSON, a byte of a name that is no UTF-8 is written as `\\udc80` to `\\udcff` (the
byte plus 0xDC00), as Python spells it; so it is in the ledger, the sidecar and the forecaster.
"""

JSON = """\
## JSON

With `--json`, a command prints one object on stdout (`watch` one on each line), also if it fails: then the object has the key `error`. [JSON](json.md) lists the
keys; `farcast schema` prints their JSON schema.
"""

JSON_INTRODUCTION = """\
With `--json`, a command prints one object on stdout; `watch` prints one on each line. A forecast or a tuned checkpoint has another object beside it, its
sidecar: `farcast.json` inside a folder, `NAME.farcast.json` beside a file NAME. Keys may be added; none is renamed or removed
while `schema_version` stays. A number that cannot be computed is `null`.

A command that fails prints an object with the one key `error` beside `schema_version`; stderr has the same for people. A command that
ends with exit code 10 prints its own answer, in which `path` is `null`; so does `inspect` for a run that cannot be used.

`farcast schema COMMAND` prints the JSON schema of an answer, `farcast schema sidecar` that of the sidecars, and
`farcast schema error` that of errors.
"""


HEADINGS = {"sidecar": "## Sidecars\n", "error": "## Errors\n"}
"""Of answers that are not one command's."""


def reference() -> str:
    """docs/cli.md; independent of the terminal."""
    group: Any = typer.main.get_command(app)
    commands = [_command(name, command) for name, command in group.commands.items() if not command.hidden]
    start = _paragraphs(group.help) + "\n" + _options([p for p in group.params if _is_option(p)])
    return "\n".join(["# Command line\n", MADE, start, *commands, CONFIG, OUTPUT, _exit_codes(), JSON])


def json_reference() -> str:
    """docs/json.md."""
    parts = ["# JSON\n", MADE, JSON_INTRODUCTION]
    for command, forms in ANSWERS.items():
        parts.append(HEADINGS.get(command, f"## farcast {command} --json\n"))
        content = schema(command)
        for form in content.get("anyOf", [content]):
            node = _resolved(form, content)
            parts += [f"{node['description']}\n"] if len(forms) > 1 else []
            parts.append(_table(("key", "meaning"), [(_code(key), meaning) for key, meaning in _keys(node, content)]))
    return "\n".join(parts)


PAGES = {"cli.md": reference, "json.md": json_reference}


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check compare them."""
    stale = 0
    for name, build in PAGES.items():
        page, text = FOLDER / name, build()
        if "--check" not in arguments:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"docs/{name} is stale: {REBUILD}\n")
            stale = 1
    return stale


# --- commands --------------------------------------------------------------------------------------------------------


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if not _is_option(p)]
    options = [p for p in command.params if _is_option(p)]
    usage = " ".join(["farcast", name, "[OPTIONS]", *(_argument_name(p) for p in arguments)])
    parts = [f"## farcast {name}\n", f"`{usage}`\n", _paragraphs(command.help)]
    if arguments:
        rows = [(_code(_argument_name(p)), p.help or "") for p in arguments]
        parts.append(_table(("argument", "meaning"), rows))
    parts += [_options(options)] if options else []
    parts.append(_examples(command.epilog or ""))
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


def _keys(node: dict[str, Any], content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a piece of a schema with their meaning, those of nested objects with their path."""
    for form in (_resolved(one, content) for one in node.get("anyOf", [node])):
        for key, value in form.get("properties", {}).items():
            yield prefix + key, value["description"]
            yield from _keys(_resolved(value, content), content, f"{prefix}{key}.")
        if "items" in form:
            yield from _keys(_resolved(form["items"], content), content, prefix.removesuffix(".") + "[].")


def _resolved(node: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["$defs"][node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else node
    return found


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
