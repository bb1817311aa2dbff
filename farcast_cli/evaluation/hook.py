"""A command that runs beside farcast, one at a time: it begins when a checkpoint is there, and its end is told later."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farcast_cli.errors import FarcastError, OutputError
from farcast_cli.evaluation.command import Command, Log, Stop, failure, is_log
from farcast_cli.evaluation.judge import PLACEHOLDER, check_command, logs_of, with_path

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.evaluation.command import Ended

OPTION = "--on-leap"


@dataclass(frozen=True, slots=True)
class Ran:
    """How a run of the command came to its end."""

    checkpoint: Path
    log: Path
    seconds: float
    failed: str
    """What went wrong, in words; empty if nothing did."""


@dataclass(slots=True)
class Hook:
    """The command, and the run of it that is under way."""

    command: str
    _thread: threading.Thread | None = None
    _stop: Stop = field(default_factory=Stop)
    _ended: list[Ran] = field(default_factory=list)

    def __post_init__(self) -> None:
        without = "read the printed paths in a script"
        check_command(self.command, option=OPTION, without=without, example=f"sbatch resume.sh {PLACEHOLDER}")

    @property
    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, checkpoint: Path) -> None:
        """Begin a run.

        Raises:
            UsageError: the command cannot be started with this path.
            OutputError: its log cannot be written.
        """
        text = with_path(self.command, checkpoint, option=OPTION)
        path = _log_for(checkpoint)
        log = Log(path, text)
        try:
            run = Command(text, log, {"FARCAST_CKPT": str(checkpoint.resolve())})
        except BaseException:
            log.close("not started")
            raise
        self._thread = threading.Thread(target=self._follow, args=(run, log, path, checkpoint), daemon=True)
        self._thread.start()

    def ended(self) -> list[Ran]:
        """The runs that have ended since this was asked last."""
        return [self._ended.pop(0) for _ in range(len(self._ended))]

    def wait(self) -> None:
        """Until the run under way has ended."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the run under way, and wait for that; a second interrupt ends it at once."""
        self._stop.asked.set()
        try:
            self.wait()
        except KeyboardInterrupt:
            self._stop.hurry.set()
            self.wait()
            raise

    def _follow(self, run: Command, log: Log, path: Path, checkpoint: Path) -> None:
        remark = "not ended well"
        try:
            ended = run.follow(None, self._stop)
            remark = ended.remark
            self._ended.append(Ran(checkpoint, path, ended.seconds, _failure_of(ended)))
        except FarcastError as error:  # its log cannot be written: the disk is full
            self._ended.append(Ran(checkpoint, path, 0.0, str(error)))
        finally:
            run.close()
            log.close(remark)


def _failure_of(ended: Ended) -> str:
    if ended.cause == "stop":
        return "was interrupted"
    return f"{failure(ended.code)}: {ended.last_line}" if ended.code else ""


def _log_for(checkpoint: Path) -> Path:
    """Beside the checkpoint; a log of an earlier run is replaced."""
    path = logs_of(checkpoint) / "on-leap.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_log(path):
            path.unlink()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    return path
