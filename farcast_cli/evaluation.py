"""Judging checkpoints by the user's own command: the last number that it prints.

Each run of the command is a process group of its own with a log of its own, and ends before the block that started it.
"""

from __future__ import annotations

import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
import time
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from farcast_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PLACEHOLDER = "{ckpt}"
LOG_BYTES = 1 << 20  # of the start of a run's output, and as many of its end, are kept in its log
SAID_BYTES = 1 << 16  # of the end of each stream, in which the number and the last line are looked for
GRACE_S = 5.0  # from SIGTERM to SIGKILL: a launcher such as torchrun must end workers in sessions of their own
LINGER_S = 2.0  # for what a command that has ended left running, such as a `tee`, before it is ended too
TICK_S = 0.05

_NUMBER = re.compile(
    r"(?<![\w.+-])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w|\.\d)", re.IGNORECASE
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours and cursor moves
_SIGNALS = {int(number): number.name for number in signal.Signals}
_LINE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Trial:
    """What the command said of the step at one strength; strength 0 is the origin itself."""

    strength: float
    value: float
    seconds: float = 0.0
    log: Path | None = None


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A shell command with {ckpt} in the place of a checkpoint's path; lower is better unless `maximize`."""

    command: str
    maximize: bool = False
    num_jobs: int = 1
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        if PLACEHOLDER not in self.command:
            raise UsageError(
                f"--eval-cmd {self.command!r}: expected {PLACEHOLDER} where the checkpoint's path belongs",
                hint="--eval-cmd 'python eval.py {ckpt}'",
            )
        if self.num_jobs < 1:
            raise UsageError(f"--jobs {self.num_jobs}: expected 1 or more")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"--eval-timeout {self.timeout_s:g}: expected a positive number of seconds")

    def command_for(self, checkpoint: Path) -> str:
        """The path is absolute, and the name its own: a link's ending may say more than that of what it leads to."""
        path = checkpoint.parent.resolve() / checkpoint.name
        return self.command.replace(PLACEHOLDER, shlex.quote(str(path)))


def best_trial(trials: Sequence[Trial], *, maximize: bool) -> Trial:
    """The best of several trials; the earlier one, and so the origin, where they tie."""
    sign = -1.0 if maximize else 1.0
    return min(trials, key=lambda trial: sign * trial.value)


def last_number(text: str) -> float | None:
    """The last number in a text, nan and infinity included; None where there is none.

    A number that is glued to letters or to other numbers is a part of a word, as in `v2`, `3.5s` or `step-100`.
    """
    numbers = _NUMBER.findall(_ESCAPES.sub("", text))
    return float(numbers[-1]) if numbers else None


def logs_of(target: Path, *, is_file: bool) -> Path:
    """The folder beside a forecast that holds the output of its evaluations."""
    return target.with_name(f"{target.stem if is_file else target.name}.eval")


def _label(strength: float) -> str:
    return f"strength {strength:g}" if strength else "the origin"


def _log_name(strength: float) -> str:
    return f"strength-{strength:g}.log" if strength else "origin.log"


# --- one run ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tail:
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


class _Log:
    """A run's output in a file: its start as it comes, its end when the run is over, nothing of what lies between."""

    def __init__(self, path: Path, command: str) -> None:
        self._file = path.open("wb")
        self._room = LOG_BYTES
        self._end = _Tail(LOG_BYTES)
        self._write(f"$ {command}\n".encode())

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
        self._file.write(data)
        self._file.flush()


@dataclass(frozen=True, slots=True)
class _Stop:
    """Told to all runs at once: end, and then: end without the time to do it well."""

    asked: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Ended:
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
            lines = [line.strip() for line in re.split(r"[\r\n]+", _ESCAPES.sub("", text)) if line.strip()]
            if lines:
                return lines[-1][:_LINE_CHARS]
        return "it printed nothing"


class _Run:
    """One run of the command: a shell in a process group of its own, whose output is read as it comes."""

    def __init__(self, command: str, log: _Log, variables: Mapping[str, str]) -> None:
        self._log = log
        self._process = subprocess.Popen(  # noqa: S602 - the user's own command
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | variables,
            start_new_session=True,
        )
        self._tails = {"stdout": _Tail(SAID_BYTES), "stderr": _Tail(SAID_BYTES)}
        self._selector = selectors.DefaultSelector()
        for name, stream in (("stdout", self._process.stdout), ("stderr", self._process.stderr)):
            assert stream is not None  # noqa: S101 - both are pipes
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, self._tails[name])

    def follow(self, timeout_s: float | None, stop: _Stop) -> _Ended:
        """Wait for the end of the whole group, and bring it about where the time is over or it is asked for."""
        started = time.monotonic()
        try:
            cause = self._watch(started + (timeout_s or math.inf), stop)
            seconds = time.monotonic() - started
            if cause == "itself":
                self._read_until_gone(LINGER_S, stop.asked)
            self._signal(signal.SIGTERM)
            self._read_until_gone(GRACE_S, stop.hurry)
        finally:
            self._signal(signal.SIGKILL)
            code = self._process.wait()
        self._read(0)  # what the pipes still hold; they are smaller than one read
        return _Ended(cause, code, seconds, self._tails["stdout"].text, self._tails["stderr"].text)

    def close(self) -> None:
        self._selector.close()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _watch(self, deadline: float, stop: _Stop) -> Literal["itself", "timeout", "stop"]:
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

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _alive(self) -> bool:
        """Whether any process of the group runs. Ended ones that nobody waits for, as in some containers, do not count."""
        self._process.poll()
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return _any_runs(self._process.pid)


def _any_runs(group: int) -> bool:
    """Whether a group has a process that is no zombie; True where there is no /proc to see it."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return True
    for process in proc.glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            state, _, its_group = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in {"Z", "X"}:
                return True
    return False


# --- several runs ----------------------------------------------------------------------------------------------------


class Judge:
    """Runs the command on several checkpoints, some at once. Leaving the block ends whatever still runs.

    Each run is followed by a thread, because a signal interrupts the main thread only: whatever was started is known.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        logs: Path,
        variables: Mapping[str, object],
        announce: Callable[[str], Callable[[int], None]],
    ) -> None:
        self._evaluator = evaluator
        self._logs = logs
        self._variables = {key: str(value) for key, value in variables.items()}
        self._announce = announce
        self._pool = futures.ThreadPoolExecutor(evaluator.num_jobs)
        self._stop = _Stop()
        self._running: dict[futures.Future[Trial], tuple[int, Callable[[int], None]]] = {}
        self._trials: dict[float, Trial | None] = {}

    def __enter__(self) -> Self:
        """Make the folder of logs, without those of an earlier forecast."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            for old in (self._logs / "origin.log", *self._logs.glob("strength-*.log")):
                old.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self._logs}: the logs of the evaluation command cannot be written: {error.strerror}",
                hint="move it away, or choose another place with -o",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the runs and not for their threads: Python before 3.13 takes one for ended whose join is interrupted."""
        try:
            self._stop.asked.set()
            self._pool.shutdown(wait=False)
            futures.wait(self._running)
        except KeyboardInterrupt:  # a second one
            self._stop.hurry.set()
            self._stop.asked.set()
            futures.wait(self._running)
            raise

    @property
    def trials(self) -> list[Trial]:
        """What has ended so far, in the order of the starts."""
        return [trial for trial in self._trials.values() if trial is not None]

    def start(self, strength: float, checkpoint: Path) -> None:
        job = min(set(range(self._evaluator.num_jobs)) - {taken for taken, _ in self._running.values()})
        self._trials[strength] = None
        told = self._announce(_label(strength))
        self._running[self._pool.submit(self._try, strength, checkpoint, job)] = job, told

    def wait(self, *, below: int) -> None:
        """Until fewer than so many runs are under way.

        Raises:
            UsageError: a run failed, ran over its time, changed the checkpoint, or gave no finite number.
        """
        while True:
            patience = None if len(self._running) >= below else 0
            futures.wait(self._running, patience, futures.FIRST_COMPLETED)
            for future in [future for future in self._running if future.done()]:
                _, told = self._running.pop(future)
                trial = future.result()
                self._trials[trial.strength] = trial
                told(1)
            if len(self._running) < below:
                return

    def _try(self, strength: float, checkpoint: Path, job: int) -> Trial:
        path = self._logs / _log_name(strength)
        before = _files_of(checkpoint) if strength else {}
        ended = self._run(self._evaluator.command_for(checkpoint), path, {"STRENGTH": f"{strength:g}", "JOB": str(job)})
        if strength and _files_of(checkpoint) != before:
            raise UsageError(
                f"the evaluation command changed the checkpoint at {_label(strength)}, which would be published",
                hint="let it write elsewhere, for example to a copy; nothing was published",
            )
        return Trial(strength, self._score(ended, strength, path), ended.seconds, path)

    def _run(self, command: str, path: Path, variables: Mapping[str, str]) -> _Ended:
        log, remark = _Log(path, command), "not ended well"
        try:
            variables = {f"FARCAST_{key}": value for key, value in (self._variables | dict(variables)).items()}
            run = _Run(command, log, variables)
            try:
                ended = run.follow(self._evaluator.timeout_s, self._stop)
            finally:
                run.close()
            remark = ended.remark
        finally:
            log.close(remark)
        return ended

    def _score(self, ended: _Ended, strength: float, log: Path) -> float:
        value = last_number(ended.stdout)
        kept = f"its output is in {log}; nothing was published"
        if ended.cause == "timeout":
            what, hint = f"ran over its {self._evaluator.timeout_s:g} s and was killed", f"a longer --eval-timeout; {kept}"
        elif ended.code:
            what, hint = _failure(ended.code), kept
        elif value is None:
            what, hint = "printed no number", f"print the score last on stdout; {kept}"
        elif not math.isfinite(value):
            what, hint = f"printed {value} as its last number", kept
        else:
            return value
        raise UsageError(f"the evaluation command {what} on {_label(strength)}: {ended.last_line}", hint=hint)


def _failure(code: int) -> str:
    """What a return code says; a shell tells a signal by a code above 128."""
    if code < 0:
        return f"was killed by {_SIGNALS.get(-code, f'signal {-code}')}"
    name = _SIGNALS.get(code - 128)
    return f"failed with exit code {code}" + (f" ({name})" if name else "")


def _files_of(checkpoint: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of change of every file of a checkpoint."""
    files = [path for path in (checkpoint, *checkpoint.rglob("*")) if path.is_file()]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
