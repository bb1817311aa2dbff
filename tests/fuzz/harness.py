"""One target, many files: reads each, judges how it ended, and counts.

Every case has a number, and its own random numbers by the seed and that number: one case can be made again alone.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_MB = 300
MAX_S = 2.0  # of this process's time, where cases are tried for a time
SENSIBLE_CODES = {2, 3, 4, 5}
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.mkdir"),
    *("os.rmdir", "os.link", "os.symlink", "os.chmod", "os.kill", "subprocess.Popen", "socket.", "shutil."),
    *("pickle.find_class", "webbrowser.open", "pty.spawn", "code.__new__", "builtins.input"),
)
"""Events of Python's audit (or how they begin) that reading a file has no reason for."""


@dataclass(frozen=True, slots=True)
class Target:
    """A reader with files for it, in a folder of its own.

    `case` makes the content of a file; `read` reads it as the program does; `check` compares what was read with what the
    format's own reader gives, and says what differs.
    """

    name: str
    file: Path
    case: Callable[[random.Random], bytes]
    read: Callable[[], Any]
    check: Callable[[Any], str] = lambda _: ""


@dataclass(slots=True)
class Tally:
    """How the cases of a target ended, and the findings with the number of the first case of each."""

    name: str
    ended: dict[str, int] = field(default_factory=dict)
    findings: dict[str, tuple[int, int]] = field(default_factory=dict)
    """What was found: the first case, and how many cases."""
    seconds: float = 0.0
    slowest_s: float = 0.0

    @property
    def cases(self) -> int:
        return sum(self.ended.values())

    def note(self, finding: str, number: int) -> None:
        first, count = self.findings.get(finding, (number, 0))
        self.findings[finding] = first, count + 1


class Watch:
    """Python's own audit, asked only while a file is read."""

    def __init__(self) -> None:
        self._is_on = False
        self.seen: Counter[str] = Counter()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        writes = event == "open" and isinstance(args[1], str) and bool(set(args[1]) & set("wax+"))
        if writes or event.startswith(FORBIDDEN):
            self.seen[event] += 1

    def start(self) -> None:
        self.seen.clear()
        self._is_on = True

    def stop(self) -> None:
        self._is_on = False


def limit_memory(room: int = 3 << 30) -> None:
    """So that a claim of a terabyte is refused by the system and ends in MemoryError."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Harness:
    """Tries cases of a target, in this process."""

    def __init__(self, watch: Watch, seed: int) -> None:
        self._watch, self._seed = watch, seed

    def run(self, target: Target, *, cases: int = 0, seconds: float = 0.0, first: int = 0) -> Tally:
        """So many cases, or as many as there is time for."""
        tally, started, number = Tally(target.name), time.monotonic(), first
        max_s = MAX_S if seconds else math.inf  # a test fails on no slow machine
        while (cases and number < first + cases) or (seconds and time.monotonic() - started < seconds):
            self._try(target, number, tally, max_s)
            number += 1
        tally.seconds = time.monotonic() - started
        return tally

    def content(self, target: Target, number: int) -> bytes:
        return target.case(random.Random(f"{self._seed} {target.name} {number}"))  # noqa: S311 - no secret

    def _try(self, target: Target, number: int, tally: Tally, max_s: float) -> None:
        target.file.write_bytes(self.content(target, number))
        peak, started = peak_mb(), time.process_time()
        self._watch.start()
        try:
            value, ended = self._read(target)
        finally:
            self._watch.stop()
        spent = time.process_time() - started
        tally.slowest_s = max(tally.slowest_s, spent)
        found = [f"asked the system for {event}" for event in self._watch.seen]
        found += [f"took {spent:.1f} s"] if spent > max_s else []
        found += [f"took over {MAX_MB} MB"] if peak_mb() - peak > MAX_MB else []
        if ended == "read":
            found += _checked(target, value)
        if ended.startswith("!"):
            found.append(ended[1:])
            ended = "other exceptions"
        tally.ended[ended] = tally.ended.get(ended, 0) + 1
        for finding in found:
            tally.note(finding, number)

    def _read(self, target: Target) -> tuple[Any, str]:
        """What was read, and how it ended; an end that must not be begins with `!`."""
        try:
            return target.read(), "read"
        except FarcastError as error:
            text = str(error)
            if error.exit_code not in SENSIBLE_CODES or not text.isprintable():
                return None, f"!{type(error).__name__}, exit code {error.exit_code}: {text[:90]!r}"
            return None, f"refused, {error.exit_code}"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the finding
            gc.collect()
            last = traceback.extract_tb(error.__traceback__)[-1]
            return None, f"!{type(error).__name__} in {Path(last.filename).name}, {last.name}: {str(error)[:80]}"


def _checked(target: Target, value: Any) -> list[str]:
    try:
        wrong = target.check(value)
    except Exception as error:  # noqa: BLE001 - each format's reader has its own
        wrong = f"read, and its format's own reader refuses it: {type(error).__name__}: {str(error)[:60]}"
    return [wrong] if wrong else []
