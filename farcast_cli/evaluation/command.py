"""One run of a command: a shell in a process group of its own, which ends as a whole, and the log of what it said.

Only for systems that have such groups: whoever asks for an evaluation on another one is told so before.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from farcast_cli import system
from farcast_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LOG_BYTES = 1 << 20  # of the start of a run's output, and as many of its end, are kept in its log
SAID_BYTES = 1 << 16  # of the end of each stream, in which the number and the last line are looked for
GRACE_S = 5.0  # from SIGTERM to SIGKILL: a launcher such as torchrun must end workers in sessions of their own
LINGER_S = 2.0  # for what a command that has ended left running, such as a `tee`, before it is ended too
TICK_S = 0.05
LOG_MARK = b"$ "  # and the command: how a log begins
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor moves
_SIGNALS = {int(number): number.name for number in signal.Signals}
_LINE_CHARS = 200


@dataclass(slots=True)
class Tail:
    """The last so many bytes of a stream."""

    limit: int
    data: bytearray = field(default_factory=bytearray)
    num_dropped: int = 0

    def add(self, data: bytes) -> None:
        self.data += data
        excess = max(0, len(self.data) - self.limit)
        del self.data[:excess]
        self.num_dropped += excess

    @property
    def text(self) -> str:
        """Without a first line that has lost its beginning."""
        text = self.data.decode(errors="replace")
        return re.split(r"[\r\n]", text, maxsplit=1)[-1] if self.num_dropped else text


class Log:
    """A run's output in a file: its start as it comes, its end when the run is over, nothing of what lies between."""

    def __init__(self, path: Path, command: str) -> None:
        self._path = path
        with self._writing():
            self._file = path.open("xb")
        self._room = LOG_BYTES
        self._end = Tail(LOG_BYTES)
        self._write(LOG_MARK + f"{command}\n".encode("utf-8", "surrogateescape"))

    def add(self, data: bytes) -> None:
        start, rest = data[: self._room], data[self._room :]
        self._room -= len(start)
        self._write(start)
        self._end.add(rest)

    def close(self, remark: str) -> None:
        with self._file:
            if self._end.num_dropped:
                self._write(f"\n[{self._end.num_dropped} bytes are left out here]\n".encode())
            self._write(bytes(self._end.data))
            self._write(f"\n[{remark}]\n".encode())

    def _write(self, data: bytes) -> None:
        with self._writing():
            self._file.write(data)
            self._file.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self._path}: the evaluation's log cannot be written: {error.strerror}", hint="choose another place with -o"
            ) from error


def is_log(path: Path) -> bool:
    """Whether a file is a log of a run, or the beginning of one; a file of somebody else's begins with something else."""
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return LOG_MARK.startswith(file.read(len(LOG_MARK)))
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Stop:
    """Told to all runs at once: end, and then: end without the time to do it well."""

    asked: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run came to its end, and the end of what it said."""

    cause: Literal["itself", "timeout", "stop"]
    code: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def remark(self) -> str:
        how = {"timeout": "killed for running over its time", "stop": "interrupted"}.get(self.cause, f"exit code {self.code}")
        return f"{how}, after {self.seconds:.1f} s"

    @property
    def last_line(self) -> str:
        """Of stderr if there is any: a crash is told there, whatever stdout still flushed after it."""
        for text in (self.stderr, self.stdout):
            lines = [line.strip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if line.strip()]
            if lines:
                return lines[-1][:_LINE_CHARS]
        return "it printed nothing"


_WATCH = """
while read -r _; do :; done
kill -s TERM -- "-$1" || exit
left=$2
while [ "$left" -gt 0 ]; do
    sleep 1
    kill -s 0 -- "-$1" || exit
    left=$((left - 1))
done
kill -s KILL -- "-$1"
"""
"""Waits for the end of its input, which comes when nobody can write to it any more; then ends a group as `follow` does."""


class Watch:
    """A process that ends a group when farcast dies without the time to do so itself, as by SIGKILL.

    It reads from a pipe that only farcast can write to. It is in a session of its own, where no signal for the group or for
    the terminal reaches it, and holds none of the user's streams.
    """

    def __init__(self, group: int, *, grace_s: float = GRACE_S) -> None:
        ours, self._end = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own script, and two numbers
                ["/bin/sh", "-c", _WATCH, "sh", str(group), f"{grace_s:.0f}"],
                stdin=ours,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._end)
            raise
        finally:
            os.close(ours)

    def close(self) -> None:
        """The group has ended: so does this."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
            os.close(self._end)


class Command:
    """One run of the command: a shell in a process group of its own, whose output is read as it comes."""

    def __init__(self, command: str, log: Log, variables: Mapping[str, str]) -> None:
        self._log = log
        with _starting():
            self._process = subprocess.Popen(  # noqa: S602 - the user's own command
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | variables,
                start_new_session=True,
            )
        try:
            with _starting():
                self._watcher = Watch(self._process.pid)
        except BaseException:
            system.end_group(self._process.pid, at_once=True)
            self._process.communicate()
            raise
        self._tails = {"stdout": Tail(SAID_BYTES), "stderr": Tail(SAID_BYTES)}
        self._selector = selectors.DefaultSelector()
        for name, stream in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            assert stream is not None  # noqa: S101 - both are pipes
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, self._tails[name])

    def follow(self, timeout_s: float | None, stop: Stop) -> Ended:
        """Wait for the end of the whole group, and bring it about where the time is over or it is asked for."""
        started = time.monotonic()
        try:
            cause = self._watch(started + (timeout_s or math.inf), stop)
            seconds = time.monotonic() - started
            if cause == "itself":
                self._read_until_gone(LINGER_S, stop.asked)
            system.end_group(self._process.pid, at_once=False)
            self._read_until_gone(GRACE_S, stop.hurry)
        finally:
            system.end_group(self._process.pid, at_once=True)
            self._watcher.close()  # while the group's number cannot be another's: its shell has not been waited for
            code = self._process.wait()
        self._read(0)  # what the pipes still hold; they are smaller than one read
        return Ended(cause, code, seconds, self._tails["stdout"].text, self._tails["stderr"].text)

    def close(self) -> None:
        self._watcher.close()
        self._selector.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _watch(self, deadline: float, stop: Stop) -> Literal["itself", "timeout", "stop"]:
        while self._process.poll() is None:
            if stop.asked.is_set():
                return "stop"
            if time.monotonic() >= deadline:
                return "timeout"
            self._read(TICK_S)
        return "itself"

    def _read_until_gone(self, patience_s: float, hurry: threading.Event) -> None:
        deadline = time.monotonic() + patience_s
        while self._alive() and not hurry.is_set() and time.monotonic() < deadline:
            self._read(TICK_S)

    def _read(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            data = os.read(key.fd, 1 << 20)
            if not data:
                self._selector.unregister(key.fileobj)
            key.data.add(data)
            self._log.add(data)

    def _alive(self) -> bool:
        """Whether any process of the group runs."""
        self._process.poll()
        return system.group_runs(self._process.pid)


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"the evaluation command cannot be started: {error.strerror}",
            hint="end other processes, and check that /bin/sh exists",
        ) from error


def failure(code: int) -> str:
    """What a return code says; a shell tells a signal by a code above 128."""
    if code < 0:
        return f"was killed by {_SIGNALS.get(-code, f'signal {-code}')}"
    name = _SIGNALS.get(code - 128)
    return f"failed with exit code {code}" + (f" ({name})" if name else "")
