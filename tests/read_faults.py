"""Runs one command again and again, and each time another of its reads fails; prints one JSON line for each run.

    LD_PRELOAD=shim.so python -m tests.read_faults FOLDER ERRNO COMMAND...

In one process that forks for each run, since importing torch takes a second. Reads of what the command writes itself, below
a folder `out` or a hidden one, are left alone.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from farcast_cli.cli import main

MAX_RUNS = 40


def run(arguments: list[str]) -> tuple[object, str]:
    """The exit code and stderr of a command."""
    said = io.StringIO()
    sys.argv = ["farcast", *arguments]
    shutil.rmtree("out", ignore_errors=True)
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())), redirect_stderr(said):
        try:
            main()
        except SystemExit as stopped:
            return stopped.code, said.getvalue()
        except BaseException:  # noqa: BLE001 - a bug, to be reported
            return 1, traceback.format_exc()


def reads_of(shim: ctypes.CDLL, folder: Path, arguments: list[str]) -> list[str]:
    """What a run reads, in this process, which has imported everything when it forks."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        shim.fault_arm(os.fsencode(folder), 0, 0, os.fsencode(log))
        code, said = run(arguments)
        shim.fault_arm(b"", 0, 0, None)
        if code:
            raise SystemExit(said)
        return log.read_text().splitlines()


def in_a_fork(shim: ctypes.CDLL, folder: Path, number: int, error: int, arguments: list[str]) -> None:
    """Print what a run came to, as a line of JSON."""
    sys.stdout.flush()
    if not os.fork():
        shim.fault_arm(os.fsencode(folder), number, error, None)
        code, said = run(arguments)
        failed = shim.fault_path().decode()
        shim.fault_arm(b"", 0, 0, None)
        os.write(1, json.dumps({"file": failed, "code": code, "stderr": said[-4000:]}).encode() + b"\n")
        os._exit(0)
    os.wait()


def sweep(folder: Path, error: int, arguments: list[str]) -> None:
    """One run for the first and the last read of each kind of each file, or for some of them where there are many."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    shim.fault_path.restype = ctypes.c_char_p
    reads = reads_of(shim, folder, arguments)
    own = {number for number, read in enumerate(reads) if re.search("/out(?:/|$)|/[.].*[.]partial", read)}
    last = {read: number for number, read in enumerate(reads) if number not in own}
    first = {read: number for number, read in reversed(list(enumerate(reads))) if number not in own}
    chosen = sorted({*first.values(), *last.values()})
    for number in chosen[:: len(chosen) // MAX_RUNS + 1]:
        in_a_fork(shim, folder, number + 1, error, arguments)


if __name__ == "__main__":
    sweep(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
