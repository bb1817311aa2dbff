"""The command line: its commands, and what turns errors and signals into exit codes. Heavy imports wait for the commands."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from farcast_cli import __version__, system
from farcast_cli.commands import (
    backtest,
    ci,
    fit,
    help,  # noqa: A004 - a command is called so
    inspect,
    keep,
    leap,
    predict,
    report,
    schema,
    streams,
    tune,
    verify,
    watch,
)
from farcast_cli.commands.options import Asked, Grouped, asked_by
from farcast_cli.errors import FarcastError, MemoryUsedUpError, NoForecastError, OutputError, RankZeroError, UsageError

INTERRUPTED = 130
EPILOG = (
    "Exit codes: 0 success, 1 bug, 2 usage error, 3 unusable snapshots, 4 unreadable or unsafe file, 5 output error,"
    " 6 a store refused the output, 10 nothing is expected to be better than the last checkpoint, 130 interrupted."
)

app = typer.Typer(
    name="farcast",
    add_completion=True,
    rich_markup_mode="rich",
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="""Forecast the weights of a training run from the checkpoints it left on disk.

farcast reads a run's checkpoints, measures how the weights move, and writes
a checkpoint for a later step, from which you resume training. It never
changes your own checkpoints.

  farcast inspect ckpts/   list the snapshots, their steps and tensors
  farcast fit ckpts/       measure the run; write forecaster.safetensors
  farcast backtest         test each method inside the run's history
  farcast predict ckpts/   write a checkpoint ahead; print its path
  farcast report ckpts/    write the verdict and its evidence as a page
  farcast verify FORECAST --against CKPT   compare with the real snapshot
  farcast leap ckpts/      leap with a memory, for a loop
  farcast watch ckpts/     follow a run while it trains
  farcast keep ckpts/      copy the weights before the trainer deletes them
  farcast tune CKPT        another tool: adapt one wide layer to labelled rows

Give the printed path to the trainer's resume option; `farcast help resume`
shows it for each trainer. `farcast help` lists the other topics.""",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="With --version: also what computes, native or numpy.")
    ] = False,
) -> None:
    if version:
        sys.stdout.write(f"farcast {__version__}{_engine() if verbose else ''}\n")
    elif context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def _engine() -> str:
    from farcast_cli.engine.native import engine

    return f" ({engine()})"


app.command(cls=Grouped, epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(cls=Grouped, epilog=fit.EXAMPLES)(fit.fit)
app.command(cls=Grouped, epilog=keep.EXAMPLES)(keep.keep)
app.command(cls=Grouped, epilog=backtest.EXAMPLES)(backtest.backtest)
app.command(cls=Grouped, epilog=report.EXAMPLES)(report.report)
app.command(cls=Grouped, epilog=predict.EXAMPLES)(predict.predict)
app.command(cls=Grouped, epilog=verify.EXAMPLES)(verify.verify)
app.command(cls=Grouped, epilog=leap.EXAMPLES)(leap.leap)
app.command(cls=Grouped, epilog=watch.EXAMPLES)(watch.watch)
app.command(cls=Grouped, epilog=tune.EXAMPLES)(tune.tune)
app.command(cls=Grouped, epilog=schema.EXAMPLES)(schema.schema)
app.command(cls=Grouped, epilog=help.EXAMPLES)(help.help)
app.command(cls=Grouped, epilog=ci.EXAMPLES)(ci.ci)


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


_ParsingError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
"""What typer raises for a command line that it cannot parse; newer versions bring a click of their own."""


def main() -> NoReturn:
    """The console script: every error becomes one line, a hint and an exit code."""
    streams.take_over()
    gc.disable()  # a command is over before cycles matter, and looking for them among 100,000 tensors takes its time
    system.on_endings(_interrupt)
    asked = asked_by(sys.argv[1:], os.environ)
    try:
        code = app(standalone_mode=False, obj=asked)
        if code == INTERRUPTED:  # newer versions of typer turn an interrupt into this code
            raise KeyboardInterrupt  # noqa: TRY301
        _check_printed(code or 0)
        sys.exit(code or 0)
    except FarcastError as error:
        _fail(error, asked)
    except (OSError, RuntimeError, UnicodeEncodeError, MemoryError) as error:
        told = _of_the_system(error)
        if told is None:
            _answer(asked, FarcastError.exit_code, f"a bug: {error!r}")
            raise
        _fail(told, asked)
    except _ParsingError as error:
        _fail(UsageError(error.format_message(), hint=f"{_asked()} --help"), asked)
    except (KeyboardInterrupt, typer.Abort):
        if not asked.rank:
            sys.stderr.write("interrupted: incomplete output was removed\n")
        _answer(asked, INTERRUPTED, "interrupted: incomplete output was removed")
        sys.exit(INTERRUPTED)
    except Exception as error:
        _answer(asked, FarcastError.exit_code, f"a bug: {error!r}")
        raise
    finally:
        gc.enable()


def _asked() -> str:
    """The command that a wrong line was meant for: the parser's own error does not always tell."""
    group: Any = typer.main.get_command(app)
    return " ".join(["farcast", *(word for word in sys.argv[1:2] if word in group.commands)])


def _check_printed(code: int) -> None:
    """That the result of a command that ended well is on stdout.

    Raises:
        OutputError: a part of it is not.
    """
    problem = streams.lost()
    if problem is not None and code in {0, NoForecastError.exit_code}:
        raise OutputError(
            f"stdout: the result cannot be printed: {problem.strerror}",
            hint="the files that the command wrote are complete; only the printed result is lost",
        )


def _of_the_system(error: Exception) -> FarcastError | None:
    """What the system fails at where no module has said so better; None for a bug."""
    from farcast_cli.files.reading import unreadable

    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's, of a GPU
        return MemoryUsedUpError("not enough memory", hint="--threads 1 needs the least; --device cpu needs no GPU memory")
    if isinstance(error, UnicodeEncodeError):
        return UsageError(f"a name cannot be written in this locale: {error}", hint="LC_ALL=C.UTF-8")
    cause = error.__context__ if isinstance(error, RuntimeError) else error  # pathlib's, for a link that leads to itself
    return unreadable(Path("an input"), cause) if isinstance(cause, OSError) else None


def _fail(error: FarcastError, asked: Asked) -> NoReturn:
    try:
        from farcast_cli.commands import render

        if not (asked.rank and isinstance(error, (UsageError, RankZeroError))):  # rank 0 says the same, or why
            render.error(error.of_rank(asked.rank) if asked.rank else error)
        _answer(asked, error.exit_code, str(error), hint=error.hint, path=error.path)
    except MemoryError:
        streams.say(f"error: {error}")
    sys.exit(error.exit_code)


def _answer(asked: Asked, code: int, message: str, *, hint: str = "", path: Path | None = None) -> None:
    """The error as the one JSON object on stdout, where that was asked for and nothing stands there yet."""
    if not asked.json or asked.rank or streams.has_printed():
        return
    from farcast_cli import answers
    from farcast_cli.commands import render
    from farcast_cli.errors import printable

    render.as_json(answers.of_error(code, printable(message), hint=hint, path=path))
