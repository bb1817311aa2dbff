"""farcast's command line, called in this process: without the seconds that a start of Python and torch takes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from farcast_cli.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable

DONE, UNUSABLE, ABSTAINED = 0, 3, 10  # exit codes that are results; any other is a failure
LEAP_OPTIONS = ("--json", "-q", "--threads", 1)


class CommandError(Exception):
    """The command failed in a way that no measurement expects."""


def farcast(*arguments: object) -> tuple[int, str]:
    """Exit code of `farcast ARGUMENTS` (0, 3 or 10) and its stdout, or for 3 the reason."""
    said, complained = io.StringIO(), io.StringIO()
    words = ["farcast", *map(str, arguments)]
    with (
        patch.object(sys, "argv", words),
        patch.dict(os.environ, _environment(), clear=True),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        code: Any = 1
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    _result(code, words, complained.getvalue())
    return int(code), complained.getvalue() if code == UNUSABLE else said.getvalue()


def _environment() -> dict[str, str]:
    """Without what a user may have set for farcast, and without a second ledger in the user's home."""
    return {key: value for key, value in os.environ.items() if not key.startswith("FARCAST_")} | {"FARCAST_STATE_DIR": ""}


def _result(code: Any, words: list[str], complained: str) -> int:
    """The exit code, where it is one of a result."""
    if code not in {DONE, UNUSABLE, ABSTAINED}:
        raise CommandError(f"{' '.join(words)}: exit {code}\n{complained}")
    return int(code)


def outside(*arguments: object) -> tuple[int, str]:
    """The same from a process of its own, as a training loop calls it."""
    words = [sys.executable, "-m", "farcast_cli", *map(str, arguments)]
    ended = subprocess.run(words, env=_environment(), capture_output=True, text=True, check=False)
    code = _result(ended.returncode, words, ended.stderr)
    return code, ended.stderr if code == UNUSABLE else ended.stdout


def predict(*arguments: object, call: Callable[..., tuple[int, str]] = farcast) -> dict[str, Any]:
    """What `farcast predict --json` says of its one forecast; its `path` is None where it abstained."""
    code, said = call("predict", *arguments, "--json", "-q", "--device", "cpu", "--threads", 1)
    if code == UNUSABLE:
        raise CommandError(said)
    return dict(json.loads(said))


def leap(*arguments: object, call: Callable[..., tuple[int, str]] = farcast) -> dict[str, Any]:
    """What `farcast leap --json` says; its `path` is missing or None where there is nothing to gain, yet or at all."""
    code, said = call("leap", *arguments, *LEAP_OPTIONS)
    if code == UNUSABLE:
        return {"path": None, "reason": said.strip()}
    return dict(json.loads(said)) if said.strip() else {"path": None}
