"""Calls of the real command, each in a process that is forked once everything is imported: that takes most of a small call.

    python -m tests.forks MODULE... < CALLS      none of these modules can be imported

Each line of CALLS is a JSON list, [folder, [argument, ...]]; each is answered by a JSON object on one line.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pkgutil
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from os import fork
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.main

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Said:
    """What came of a call; `used` is what the process that was forked tells beside it."""

    returncode: int
    stdout: str
    stderr: str
    used: list[str] = field(default_factory=list)


class Server:
    """The other end: a process that answers calls, until it is closed."""

    def __init__(self, *command: str, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**environment, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: object, cwd: Path) -> Said:
        ours, its = self._process.stdin, self._process.stdout
        assert ours is not None
        assert its is not None
        ours.write(json.dumps((str(cwd), [str(argument) for argument in arguments])) + "\n")
        ours.flush()
        return Said(**json.loads(its.readline()))

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0


def serve(used: Callable[[], list[str]] = list) -> None:
    """Answer the calls that come by stdin; farcast is imported."""
    for line in sys.stdin:
        sys.stdout.flush()
        if not fork():
            os.write(1, json.dumps(_called(*json.loads(line)) | {"used": used()}).encode() + b"\n")
            os._exit(0)
        os.wait()


def _called(folder: str, arguments: list[str]) -> dict[str, Any]:
    from farcast_cli.cli import main

    code: object = 1
    said, errors = io.StringIO(), io.StringIO()
    os.chdir(folder)
    sys.argv = ["farcast", *arguments]
    with redirect_stdout(said), redirect_stderr(errors):
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:  # noqa: BLE001 - a bug, to be reported
            traceback.print_exc()
    return {"returncode": code, "stdout": said.getvalue(), "stderr": errors.getvalue()}


def import_all(missing: Sequence[str] = ()) -> None:
    """The package but what is for import by a training; and what needs one of the missing packages is imported by nobody."""
    import farcast_cli

    for module in pkgutil.walk_packages(farcast_cli.__path__, "farcast_cli."):
        if module.name.split(".")[1] not in {"__main__", "hf", "lightning", "live", "loop"}:
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                if (error.name or "").split(".")[0] not in missing:
                    raise
    from farcast_cli.cli import app

    build_commands_once(app)


def build_commands_once(app: typer.Typer) -> None:
    """Typer builds all commands anew at each call, which is half the time of a small one; here they are built once a process."""
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(app)


if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(sys.argv[1:]))  # type: ignore[arg-type]
    import_all(sys.argv[1:])
    serve()
