"""The command `help`: parse, one library call, render."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from farcast_cli.errors import UsageError
from farcast_cli.texts import names_of, read_text, title_of, wrapped

EXAMPLES = "Example: farcast help resume"


def help(  # noqa: A001 - a command is called as its function
    context: typer.Context,
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="[TOPIC]", autocompletion=lambda: names_of("topics"), help="What to explain; by default the list of topics."
        ),
    ] = None,
) -> None:
    """Explain a topic: resume, leaps, watch, formats, convert, ci, exit-codes or evaluation."""
    from farcast_cli.commands import render

    topics = names_of("topics")
    if topic is None:
        render.text("".join(f"farcast help {name:<12} {title_of(name)}\n" for name in topics))
    elif topic in topics:
        render.text(wrapped(read_text("topics", topic), render.stdout().width))
    else:
        group: Any = context.parent.command if context.parent else None
        hint = f"farcast {topic} --help" if group and topic in group.commands else "farcast --help lists the commands"
        raise UsageError(f"{topic}: expected one of {', '.join(topics)}", hint=hint)
