"""farcast's command line, called in this process: without the seconds that a start of Python and torch takes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any
from unittest.mock import patch

from farcast_cli.cli import main

DONE, UNUSABLE, ABSTAINED = 0, 3, 10  # exit codes that are results; any other is a failure


class CommandError(Exception):
    """The command failed in a way that no measurement expects."""


def farcast(*arguments: object) -> tuple[int, str]:
    """Exit code of `farcast ARGUMENTS` (0, 3 or 10) and its stdout, or for 3 the reason."""
    said, complained = io.StringIO(), io.StringIO()
    words = ["farcast", *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FARCAST_")}
    with (
        patch.object(sys, "argv", words),
        patch.dict(os.environ, clean, clear=True),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(complained),
    ):
        code: Any = 1
        try:
            main()
        except SystemExit as stopped:
            code = stopped.code
    if code not in {DONE, UNUSABLE, ABSTAINED}:
        raise CommandError(f"{' '.join(words)}: exit {code}\n{complained.getvalue()}")
    return int(code), complained.getvalue() if code == UNUSABLE else said.getvalue()


def predict(*arguments: object) -> dict[str, Any]:
    """What `farcast predict --json` says of its one forecast; its `path` is None where it abstained."""
    code, said = farcast("predict", *arguments, "--json", "-q", "--device", "cpu", "--threads", 1)
    if code == UNUSABLE:
        raise CommandError(said)
    return dict(json.loads(said))
