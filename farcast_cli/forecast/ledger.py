"""The ledger of leaps: which forecasts a run may have resumed from, and where its own history begins since.

A leap is movement that training did not make. A forecaster fitted across one would be judged by its own forecasts, so
`fit` reads only what came after the last leap that the run resumed from. `predict` writes a line for every checkpoint
to resume from; whether training did resume from it, the snapshots tell.

The ledger is JSON lines, because appending a line cannot damage the others. Paths in it are relative to its folder.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from farcast_cli.choices import CountersMode  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.errors import FarcastError, FileFormatError, OutputError, TooFewSnapshotsError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size, local, portable, read_bytes, reading
from farcast_cli.files.staged import sync
from farcast_cli.forecast.accumulate import accumulate
from farcast_cli.run.alignment import align
from farcast_cli.trainers import recognise

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import Snapshot

_INERT = {ord(mark): f"\\u{ord(mark):04x}" for mark in "$`!"}
"""What a shell obeys between double quotes, as JSON's own escapes. The quotes of JSON are quotes to a shell as well."""
_BEGINNING = '{"run":'
NUM_COMPARED = 1_024  # elements per tensor, enough to tell a forecast from a snapshot


class Leap(BaseModel):
    """A published forecast to resume from. `run` and `forecast` are relative to the ledger's folder."""

    model_config = ConfigDict(frozen=True)
    run: str
    origin_step: int
    valid_step: int
    counters: CountersMode
    forecast: str

    @property
    def resumes_after(self) -> int:
        """The step that the trainer's counters are at when it resumes."""
        return self.valid_step if self.counters == "advance" else self.origin_step

    def relative_to(self, home: Path) -> Leap:
        return self.model_copy(
            update={"run": os.path.relpath(self.run, home), "forecast": os.path.relpath(self.forecast, home)}
        )

    def as_line(self) -> str:
        """As the ledger holds it: JSON in ASCII, in which no name is a command, even where a shell reads the file."""
        named = self.model_dump() | {"run": portable(self.run), "forecast": portable(self.forecast)}
        return json.dumps(named, separators=(",", ":")).translate(_INERT)


@dataclass(frozen=True, slots=True)
class History:
    """The part of a trajectory that a forecaster may learn from: all of it, or what came after the last leap."""

    trajectory: Trajectory
    leap: Leap | None
    num_before: int


@contextmanager
def recorded(ledger: Path, leaps: Sequence[Leap]) -> Iterator[None]:
    """Append leaps to the ledger; take the lines back if the block, which publishes the forecasts, fails.

    The lines come first: a forecast that a killed process published without its line would be taken for training. A line
    that is there already, because such a process was killed before it published anything, is not written twice.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        fd, is_new = _open_locked(ledger)
    except OSError as error:
        raise _cannot_be_written(ledger, error) from error
    try:
        before = os.fstat(fd).st_size
        try:
            after = _append(fd, ledger, leaps)
        except OSError as error:
            _take_back(ledger, fd, before, is_new=is_new)
            raise _cannot_be_written(ledger, error) from error
        try:
            yield
        except BaseException:
            if os.fstat(fd).st_size == after:  # without locks, another process may have added a line
                _take_back(ledger, fd, before, is_new=is_new)
            raise
    finally:
        os.close(fd)


def _open_locked(ledger: Path) -> tuple[int, bool]:
    """The ledger, locked where the filesystem has locks, and whether it is new."""
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    ledger.parent.mkdir(parents=True, exist_ok=True)
    while True:
        is_new = not os.path.lexists(ledger)
        try:
            fd = os.open(ledger, flags | (os.O_CREAT | os.O_EXCL) * is_new, 0o666)
        except (FileExistsError, FileNotFoundError):  # made or removed by another process since
            continue
        try:
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), ledger.stat(follow_symlinks=False)):
                    return fd, is_new
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # removed by another process since: once more


def _append(fd: int, ledger: Path, leaps: Sequence[Leap]) -> int:
    """Write the lines that are missing; returns the size of the ledger afterwards."""
    content = os.pread(fd, os.fstat(fd).st_size, 0)
    home = ledger.parent.resolve()
    lines = [leap.relative_to(home).as_line() for leap in leaps]
    missing = [line for line in dict.fromkeys(lines) if line.encode() not in content.split(b"\n")]
    # on a line of its own even if a killed process left half a line
    text = "\n" * bool(content and not content.endswith(b"\n")) + "".join(f"{line}\n" for line in missing)
    raw = text.encode() if missing else b""
    while raw:
        raw = raw[os.write(fd, raw) :]
    os.fsync(fd)
    sync(ledger.parent)
    return os.fstat(fd).st_size


def _take_back(ledger: Path, fd: int, size: int, *, is_new: bool) -> None:
    with suppress(OSError):
        if is_new:
            ledger.unlink()
        else:
            os.ftruncate(fd, size)


def _cannot_be_written(ledger: Path, error: OSError) -> OutputError:
    is_link = error.errno == errno.ELOOP
    what = "it is a link" if is_link else error.strerror
    hint = "name the file itself with --ledger" if is_link else "choose another place with --ledger"
    return OutputError(f"{ledger}: the ledger of leaps cannot be written: {what}", hint=hint)


def check_ledger(ledger: Path, run: Path) -> None:
    """That lines may be appended: to a ledger or a new file only.

    Raises:
        OutputError: a folder.
        FileFormatError: an existing file that is no ledger.
    """
    with reading(ledger):
        is_folder, is_file = ledger.is_dir(), ledger.is_file()
    if is_folder:
        raise OutputError(f"{ledger}: expected the ledger of leaps, found a folder", hint="--ledger FILE")
    if is_file:
        read_leaps(ledger, run)


def read_leaps(ledger: Path, run: Path) -> list[Leap]:
    """The leaps that were forecast from a run's folder, in the order of their steps, with absolute paths.

    Raises:
        FileFormatError: a line that is no leap.
    """
    try:
        with reading(ledger):
            if not ledger.exists():
                return []
            lines = read_bytes(ledger, 0, file_size(ledger)).decode().split("\n")
            home, found = ledger.parent.resolve(), list[Leap]()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{ledger}: the ledger of leaps cannot be read: {error}") from error
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or (line[: len(_BEGINNING)] == _BEGINNING[: len(line)] and not line.endswith("}")):
            continue  # the half line that a killed process left was of a forecast that it did not publish
        try:
            leap = Leap.model_validate(parse_json(line.encode()))
        except ValueError as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise FileFormatError(
                f"{ledger}: line {number}: expected a leap: {why}", hint="correct or remove that line"
            ) from error
        try:
            its_run, forecast = (home / local(leap.run)).resolve(), (home / local(leap.forecast)).resolve()
        except (ValueError, OSError) as error:
            raise FileFormatError(
                f"{ledger}: line {number}: expected a path: {error}", hint="correct or remove that line"
            ) from error
        if its_run == run.resolve():
            found.append(leap.model_copy(update={"run": str(run), "forecast": str(forecast)}))
    return sorted(found, key=lambda leap: leap.resumes_after)


def since_last_leap(trajectory: Trajectory, leaps: Sequence[Leap], *, minimum: int) -> History:
    """The snapshots since the last leap that the run resumed from.

    Raises:
        TooFewSnapshotsError: fewer than `minimum` of them.
    """
    last: Leap | None = None
    for leap in leaps:
        if resumed_from(leap, trajectory, landed=last.resumes_after if last else -1):
            last = leap
    if last is None:
        return History(trajectory, None, 0)
    later = tuple(snapshot for snapshot in trajectory.snapshots if snapshot.step > last.resumes_after)
    if len(later) < minimum:
        raise TooFewSnapshotsError(
            f"{trajectory.directory}: {len(later)} snapshots since the leap to step {last.resumes_after}"
            f" ({Path(last.forecast).name}), and fit needs {minimum}",
            hint="continue training and fit again, or select the history with --steps A:B",
        )
    return History(replace(trajectory, snapshots=later), last, len(trajectory.snapshots) - len(later))


def resumed_from(leap: Leap, trajectory: Trajectory, *, landed: int = -1) -> bool:
    """Whether training resumed from a forecast, as the run's snapshots tell.

    A run that has no snapshot from the origin to the forecast's step, where it would have saved some, has jumped there.
    Otherwise the weights decide: after a leap the next snapshot lies nearer to the forecast than to the snapshot before.
    Where the forecast is gone, a run whose counters were kept is taken to have resumed (a shorter history does no harm,
    a leap taken for movement does), and one that has snapshots in between not. A leap shorter than the distance between
    snapshots cannot be told from training, and hardly matters.

    Args:
        landed: where the run resumed from a leap before this one: the move from there to the next snapshot is not all training's.
    """
    before = [snapshot for snapshot in trajectory.snapshots if snapshot.step <= leap.resumes_after]
    after = [snapshot for snapshot in trajectory.snapshots if snapshot.step > leap.resumes_after]
    if not before or not after:
        return bool(after)
    if leap.counters == "advance":
        if leap.valid_step - leap.origin_step < _usual_interval(trajectory):
            return False
        if before[-1].step <= leap.origin_step:
            return True
    past = _drift_before(leap, [snapshot for snapshot in trajectory.snapshots if snapshot.step > landed])
    nearer = _nearer_to_forecast(leap, past, before[-1], after[0])
    return leap.counters == "keep" if nearer is None else nearer


def _usual_interval(trajectory: Trajectory) -> float:
    """The median distance between snapshots, in steps."""
    gaps = sorted(late - early for early, late in itertools.pairwise(trajectory.steps))
    return gaps[len(gaps) // 2]


def _nearer_to_forecast(leap: Leap, past: Sequence[Snapshot], before: Snapshot, after: Snapshot) -> bool | None:
    """Whether a snapshot lies nearer to the forecast than to the snapshot before it; None where that cannot be read.

    As they are, and once both are carried on to its step by the drift before the leap: a plain run comes near a forecast
    that lay ahead of it. A snapshot before that equals the forecast is the forecast, put into the run's folder.

    Args:
        past: two snapshots that show the drift; the forecast's own step shows it where there are none.
    """
    path, num_read = Path(leap.forecast), len(past) + 3
    try:
        with reading(path):
            layout = recognise(path) if path.exists() else None
        if layout is None:
            return None
        alignment = align((*past, before, layout.read(path), after))
        gram, _ = accumulate(alignment, range(num_read), num_samples=NUM_COMPARED)
    except FarcastError:
        return None
    moves = np.eye(num_read + 1)[: num_read - 1]  # from each snapshot to the next, over the basis (R,)
    drift = moves[0] / (past[1].step - past[0].step) if past else moves[-2] / max(1, leap.valid_step - leap.origin_step)
    carried = drift * (after.step - leap.resumes_after), drift * (after.step - before.step)
    return not gram.total_norm(moves[-2]) or all(
        gram.total_norm(moves[-1] - share * carried[0]) < gram.total_norm(moves[-2] + moves[-1] - share * carried[1])
        for share in (0, 1)
    )


def _drift_before(leap: Leap, snapshots: Sequence[Snapshot]) -> tuple[Snapshot, ...]:
    """Two snapshots that the run's drift before a leap shows between, as far apart as it leapt; none where there is one."""
    seen = [snapshot for snapshot in snapshots if snapshot.step <= leap.origin_step]
    start = leap.origin_step - (leap.valid_step - leap.origin_step)
    early = [snapshot for snapshot in seen if snapshot.step <= start][-1:] or seen[:1]
    return (early[0], seen[-1]) if early and early[0].step < seen[-1].step else ()
