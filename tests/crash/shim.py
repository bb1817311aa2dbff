"""The shim: compiling it, and telling it which call of this process and its children is to go wrong, and how."""

from __future__ import annotations

import ctypes
import errno
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SOURCE = Path(__file__).with_name("shim.c")
OFF, WATCH, KILL, SIGNAL, FAIL, SHORT = range(6)

READS = {"open-read", "read", "pread", "preadv", "readv", "mmap"}
PARTIAL_WRITES = {"write", "pwrite", "writev", "pwritev", "sendfile", "copy-range"}
MAKES = {"create", "mkdir", "rename", "exchange", "link", "symlink", "fallocate", "fsync", *PARTIAL_WRITES}
"""Calls that may need room on the disk."""

FaultName = Literal["kill -9", "SIGINT", "SIGTERM", "EIO", "ENOSPC", "short write", "EIO read"]


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that was seen: its kind, its path (and the second of a rename), and whether it succeeded."""

    kind: str
    path: str
    second: str = ""
    succeeded: bool = True


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at a call."""

    name: FaultName
    mode: int
    number: int = 0

    @property
    def is_kill(self) -> bool:
        return self.mode == KILL

    @property
    def is_signal(self) -> bool:
        return self.mode == SIGNAL

    def applies_to(self, call: Call, *, is_input: bool) -> bool:
        """Whether this can happen at a call. Opening one's own output again counts with the writes."""
        if self.name == "EIO read":
            return call.kind in READS and is_input
        if call.kind in READS:
            return self.mode == FAIL and self.number == errno.EIO and call.kind == "open-read" and not is_input
        if self.name == "short write":
            return call.kind in PARTIAL_WRITES
        return self.name != "ENOSPC" or call.kind in MAKES


FAULTS = (
    Fault("kill -9", KILL),
    Fault("SIGINT", SIGNAL, signal.SIGINT),
    Fault("SIGTERM", SIGNAL, signal.SIGTERM),
    Fault("EIO", FAIL, errno.EIO),
    Fault("ENOSPC", FAIL, errno.ENOSPC),
    Fault("short write", SHORT),
    Fault("EIO read", FAIL, errno.EIO),
)


def why_not() -> str:
    """Why the shim cannot be built here; empty where it can."""
    if not sys.platform.startswith("linux"):
        return "the shim stands in for Linux's system calls"
    return "" if shutil.which("cc") else "there is no C compiler, cc"


def build(folder: Path) -> Path:
    library = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


class Shim:
    """The shim of this process, which was started with it (LD_PRELOAD)."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("shim_call", "shim_path"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def arm(self, root: Path, mode: int, *, target: int = 0, number: int = 0, log: int = -1) -> None:
        """From now on the calls below a folder are counted, by this process and those that it forks."""
        self._library.shim_arm(str(root).encode(), mode, target, number, log)

    def disarm(self) -> None:
        self._library.shim_disarm()

    @property
    def fired(self) -> Call | None:
        """The call at which the last fault happened."""
        if not self._library.shim_fired():
            return None
        return Call(self._library.shim_call().decode(), self._library.shim_path().decode(errors="replace"))


def parse_log(text: str) -> list[Call]:
    """The calls that the shim wrote down, in order."""
    found = []
    for line in text.splitlines():
        kind, path, second, succeeded = line.split("\t")
        found.append(Call(kind, path, second, succeeded == "1"))
    return found
