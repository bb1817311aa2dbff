"""Judging checkpoints by the user's own command: the last number that it prints.

Each run of the command is a process group of its own with a log of its own, and ends before the block that started it.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shlex
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from farcast_cli import system
from farcast_cli.errors import OutputError, UsageError
from farcast_cli.evaluation.command import ESCAPES, Command, Ended, Log, Stop, failure, is_log

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Announce = Callable[[str], Callable[[int], None]]

PLACEHOLDER = "{ckpt}"

_NUMBER = re.compile(
    r"(?<![\w.+-])[-+]?(?:\d++\.?\d*+(?:e[-+]?\d++)?|\.\d++(?:e[-+]?\d++)?|nan|inf(?:inity)?)(?!\w|\.\d)", re.IGNORECASE
)
"""Digits are taken whole (`++`): to try every shorter number first takes seconds on a long row of digits."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the command said of the step at one strength; strength 0 is the origin itself."""

    strength: float
    value: float
    seconds: float = 0.0
    log: Path | None = None


class Judging(Protocol):
    """Scores checkpoints, one after another or some at once; a block, at whose end nothing runs any more."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def trials(self) -> list[Trial]:
        """What has ended so far."""

    def start(self, strength: float, checkpoint: Path, /) -> None:
        """Score a checkpoint; strength 0 is the origin itself."""

    def wait(self, *, below: int) -> None:
        """Until fewer than so many are under way."""

    def check(self, strength: float, checkpoint: Path, /) -> None:
        """See that nothing changed a checkpoint."""


class Scorer(Protocol):
    """What gives a checkpoint a score: the user's command, or a function in this process."""

    @property
    def maximize(self) -> bool:
        """Whether higher is better."""

    @property
    def num_jobs(self) -> int:
        """How many checkpoints it scores at once."""

    def judge(self, logs: Path, variables: Mapping[str, object], announce: Announce) -> Judging:
        """Begin to score the checkpoints of one call."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A shell command with {ckpt} in the place of a checkpoint's path; lower is better unless `maximize`."""

    command: str
    maximize: bool = False
    num_jobs: int = 1
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        without = "compare the forecast with the last checkpoint yourself"
        check_command(self.command, option="--eval-cmd", without=without, example="python eval.py {ckpt}")
        if self.num_jobs < 1:
            raise UsageError(f"--jobs {self.num_jobs}: expected 1 or more")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise UsageError(f"--eval-timeout {self.timeout_s:g}: expected a positive number of seconds")

    def judge(self, logs: Path, variables: Mapping[str, object], announce: Announce) -> Judge:
        return Judge(self, logs, variables, announce)

    def command_for(self, checkpoint: Path) -> str:
        return with_path(self.command, checkpoint, option="--eval-cmd")


def check_command(command: str, *, option: str, without: str, example: str) -> None:
    """That a command can be run here, and takes the path of a checkpoint.

    Args:
        without: what to do where it cannot be run.

    Raises:
        UsageError: it cannot, or does not.
    """
    if not system.HAS_GROUPS:
        raise UsageError(
            f"{option}: expected a system that can end a command with all that it started (Linux, macOS), found another one",
            hint=f"leave {option} out, and {without}",
        )
    if PLACEHOLDER not in command:
        raise UsageError(
            f"{option} {command!r}: expected {PLACEHOLDER} in place of the checkpoint's path", hint=f"{option} '{example}'"
        )


def with_path(command: str, checkpoint: Path, *, option: str) -> str:
    """A command for a checkpoint.

    The path is absolute, and the name its own: a link's ending may say more than that of what it leads to.

    Raises:
        UsageError: the path needs quotes, and the command has the placeholder inside quotes.
    """
    path = str(checkpoint.parent.resolve() / checkpoint.name)
    word = shlex.quote(path)
    before = command.split(PLACEHOLDER)[:-1]
    if word != path and any(_is_within_quotes(PLACEHOLDER.join(before[: n + 1])) for n in range(len(before))):
        raise UsageError(
            f"{option}: {PLACEHOLDER} is inside quotes, but the path {path} needs its own quotes",
            hint=f"write {PLACEHOLDER} without quotes: farcast adds them if necessary",
        )
    return command.replace(PLACEHOLDER, word)


_QUOTING = re.compile(r"\\.|'[^']*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)


def _is_within_quotes(text: str) -> bool:
    """Whether a shell that has read this much is in a quotation or a here-document, in which quotes are something else."""
    return any(mark in _QUOTING.sub("", text) for mark in ("'", '"', "\\", "`", "<<"))


def best_trial(trials: Sequence[Trial], *, maximize: bool) -> Trial:
    """The best of several trials; the earlier one, and so the origin, where they tie."""
    sign = -1.0 if maximize else 1.0
    return min(trials, key=lambda trial: sign * trial.value)


def last_number(text: str) -> float | None:
    """The last number in a text, nan and infinity included; None where there is none.

    A number that is glued to letters or to other numbers is a part of a word, as in `v2`, `3.5s` or `step-100`.
    """
    numbers = _NUMBER.findall(ESCAPES.sub("", text))
    return float(numbers[-1]) if numbers else None


def logs_of(target: Path) -> Path:
    """The folder beside a forecast that holds the output of its evaluations."""
    return target.with_name(f"{target.name}.eval")


def _label(strength: float) -> str:
    return f"strength {strength:g}" if strength else "the origin"


def _log_name(strength: float) -> str:
    return f"strength-{strength:g}.log" if strength else "origin.log"


_OWN_LOG = re.compile(r"strength--?[0-9.]+\.log")


class Judge:
    """Runs the command on several checkpoints, some at once. Leaving the block ends whatever still runs.

    Each run is followed by a thread, because a signal interrupts the main thread only: whatever was started is known.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        logs: Path,
        variables: Mapping[str, object],
        announce: Announce,
    ) -> None:
        self._evaluator = evaluator
        self._logs = logs
        self._variables = {key: str(value) for key, value in variables.items()}
        self._announce = announce
        self._pool = futures.ThreadPoolExecutor(evaluator.num_jobs)
        self._stop = Stop()
        self._running: dict[futures.Future[Trial], tuple[int, Callable[[int], None]]] = {}
        self._trials: dict[float, Trial | None] = {}
        self._files: dict[float, dict[Path, tuple[int, ...]]] = {}

    def __enter__(self) -> Self:
        """Make the folder of logs, without those of an earlier forecast; nothing else in it is touched."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            if self._logs.is_symlink():
                raise OSError(errno.ELOOP, "it is a link")  # noqa: TRY301 - one message for all that is wrong with it
            for old in (
                self._logs / "origin.log",
                *(path for path in self._logs.glob("strength-*.log") if _OWN_LOG.fullmatch(path.name)),
            ):
                if os.path.lexists(old) and not is_log(old):
                    raise OSError(errno.EEXIST, f"{old.name} was not written by farcast")  # noqa: TRY301 - likewise
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

    def check(self, strength: float, checkpoint: Path) -> None:
        """See that no run changed a checkpoint, its own or a later one.

        Raises:
            UsageError: one did.
        """
        if _files_of(checkpoint) != self._files[strength]:
            raise _changed(strength)

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
        before = self._files[strength] = _files_of(checkpoint) if strength else {}
        ended = self._run(self._evaluator.command_for(checkpoint), path, {"STRENGTH": f"{strength:g}", "JOB": str(job)})
        if strength and _files_of(checkpoint) != before:
            raise _changed(strength)
        return Trial(strength, self._score(ended, strength, path), ended.seconds, path)

    def _run(self, command: str, path: Path, variables: Mapping[str, str]) -> Ended:
        log, remark = Log(path, command), "not ended well"
        try:
            variables = {f"FARCAST_{key}": value for key, value in (self._variables | dict(variables)).items()}
            run = Command(command, log, variables)
            try:
                ended = run.follow(self._evaluator.timeout_s, self._stop)
            finally:
                run.close()
            remark = ended.remark
        finally:
            log.close(remark)
        return ended

    def _score(self, ended: Ended, strength: float, log: Path) -> float:
        value = last_number(ended.stdout)
        kept = f"its output is in {log}; nothing was published"
        if ended.cause == "timeout":
            what, hint = f"ran over its {self._evaluator.timeout_s:g} s and was killed", f"a longer --eval-timeout; {kept}"
        elif ended.code:
            what, hint = failure(ended.code), kept
        elif value is None:
            what, hint = "printed no number", f"print the score last on stdout; {kept}"
        elif not math.isfinite(value):
            what, hint = f"printed {value} as its last number", kept
        else:
            return value
        raise UsageError(f"the evaluation command {what} on {_label(strength)}: {ended.last_line}", hint=hint)


def _changed(strength: float) -> UsageError:
    return UsageError(
        f"the evaluation command changed the checkpoint at {_label(strength)}, which would be published",
        hint="change the command so that it writes to a copy; nothing was published",
    )


def _files_of(checkpoint: Path) -> dict[Path, tuple[int, ...]]:
    """Size and times of change of every file of a checkpoint; the later one cannot be set back."""
    files = [path for path in (checkpoint, *checkpoint.rglob("*")) if path.is_file()]
    return {path: (found.st_size, found.st_mtime_ns, found.st_ctime_ns) for path in files for found in [path.stat()]}
