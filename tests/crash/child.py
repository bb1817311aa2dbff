"""One call of the real command in a forked process, with a fault at one of its system calls.

Forked after everything was imported, a call takes a tenth of the time that a process of its own would take.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from tests.crash.shim import WATCH, Call, Fault, Shim, parse_log
from tests.forks import import_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TIMEOUT_S = 300  # a call takes a tenth of a second, but on a machine that is very busy


@dataclass(frozen=True, slots=True)
class Done:
    """How a call ended, what it said, and where it was struck; a negative code is a signal's."""

    code: int
    out: str
    err: str
    struck: Call | None = None

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


def import_everything() -> None:
    """The package; what else a command imports when it is called, `Caller.plain` finds out."""
    import_all()
    gc.freeze()  # a child that looks for cycles would copy all these pages


class Caller:
    """Calls commands in a work folder; what they say lies beside it."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._shim = Shim()
        self._out, self._err, self._log = (work.parent / f"said.{name}" for name in ("out", "err", "log"))
        self._imported = work.parent / "imported"

    def plain(self, args: Sequence[str]) -> Done:
        """And import here what the call imported, so that the next one need not."""
        done = self._call(args)
        for name in self._imported.read_text().split():
            if name not in sys.modules:
                with suppress(ImportError):  # some are made up by others
                    importlib.import_module(name)
        return done

    def watched(self, args: Sequence[str]) -> tuple[Done, list[Call]]:
        """And every call below the work folder."""
        self._log.write_bytes(b"")
        done = self._call(args, watch=True)
        return done, parse_log(self._log.read_text())

    def struck(self, args: Sequence[str], fault: Fault, target: int) -> Done:
        return self._call(args, fault, target)

    def _call(self, args: Sequence[str], fault: Fault | None = None, target: int = 0, *, watch: bool = False) -> Done:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            self._live(args, fault, target, watch=watch)
        _, status = os.waitpid(child, 0)
        self._shim.disarm()
        struck = self._shim.fired if fault else None
        out, err = (path.read_text(errors="replace") for path in (self._out, self._err))
        return Done(os.waitstatus_to_exitcode(status), out, err, struck)

    def _live(self, args: Sequence[str], fault: Fault | None, target: int, *, watch: bool) -> NoReturn:
        """The child's whole life."""
        code = 1
        try:
            self._redirect()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(TIMEOUT_S)
            if fault:
                self._shim.arm(self._work, fault.mode, target=target, number=fault.number)
            elif watch:
                self._shim.arm(self._work, WATCH, log=os.open(self._log, os.O_WRONLY | os.O_APPEND))
            code = _code_of_main(args)
        finally:
            self._shim.disarm()
            sys.stdout.flush()
            sys.stderr.flush()
            self._imported.write_text("\n".join(sys.modules))
            os._exit(code)

    def _redirect(self) -> None:
        os.chdir(self._work)
        for number, path in ((1, self._out), (2, self._err)):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(fd, number)
            os.close(fd)
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8")
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)


def _code_of_main(args: Sequence[str]) -> int:
    from farcast_cli.cli import main

    sys.argv = ["farcast", *args]
    try:
        main()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:  # noqa: BLE001 - as Python itself ends where nothing is caught
        traceback.print_exc()
        return 1
