"""The second ledger of a run, in the user's state folder: found by the run's own path from any working directory.

The first ledger lies where the command was called, so another working directory or a cleaned checkout does not see it. The
second is a help and no more: where it cannot be written or read, a note says so and the command goes on.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.errors import FarcastError, OutputError
from farcast_cli.files.reading import named_for_good
from farcast_cli.forecast.ledger import Leap, read_leaps, recorded, withdraw
from farcast_cli.trainers import trainer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from farcast_cli.choices import CountersMode
    from farcast_cli.run.trajectory import Trajectory
    from farcast_cli.trainers.base import LeapMark, Snapshot


@dataclass(frozen=True, slots=True)
class Ledgers:
    """Where the leaps of a run are recorded."""

    file: Path
    """The ledger that the user sees."""
    state: Path | None = None
    """farcast's folder of state; None where the user has switched it off."""

    def second(self, run: Path) -> Path | None:
        """A run's ledger in the state folder."""
        name = hashlib.sha256(os.fsencode(named_for_good(run))).hexdigest()
        return None if self.state is None else self.state.absolute() / "ledgers" / f"{name}.jsonl"


@contextmanager
def recorded_in_both(ledgers: Ledgers, run: Path, leaps: Sequence[Leap], tell: Callable[[str], None]) -> Iterator[None]:
    """Append leaps to both ledgers; take the lines back if the block, which publishes the forecasts, fails.

    Args:
        tell: is told why the second cannot be written, if it cannot.

    Raises:
        OutputError: the first ledger cannot be written.
    """
    with ExitStack() as stack:
        stack.enter_context(recorded(ledgers.file, leaps))
        second = ledgers.second(run)
        try:
            if second is not None:
                _check_apart(second, run)
                stack.enter_context(recorded(second, leaps, is_private=True))
        except OutputError as error:
            tell(
                f"{error}; so only {ledgers.file} tells farcast of this leap: name it with --ledger from other folders"
                " (FARCAST_STATE_DIR chooses another place, and an empty one switches this off)"
            )
        yield


def withdraw_from_both(ledgers: Ledgers, run: Path, leaps: Sequence[Leap]) -> None:
    """Blank the lines of leaps that the run did not make after all.

    Raises:
        OutputError: a ledger cannot be written.
    """
    withdraw(ledgers.file, leaps)
    second = ledgers.second(run)
    if second is not None and second.exists():
        withdraw(second, leaps, is_private=True)


def _check_apart(second: Path, run: Path) -> None:
    if second.resolve().is_relative_to(run.resolve()):
        raise OutputError(f"{second}: the ledger of leaps cannot be written: it lies inside the run's folder")


@dataclass(frozen=True, slots=True)
class Known:
    """The leaps of a run that its ledgers tell of, and what a person should know of the ledgers."""

    leaps: tuple[Leap, ...] = ()
    notes: tuple[str, ...] = ()


def known_leaps(ledgers: Ledgers | None, trajectory: Trajectory) -> Known:
    """The leaps of both ledgers and those that the newest snapshot is marked with, each once, in the order of resuming.

    The state folder outlives a run. So a leap in it does not count where the snapshot that it began at has other weights now:
    a run that was started again in the same folder.

    Raises:
        FileFormatError: the first ledger cannot be read.
    """
    if ledgers is None:
        return Known(_marked([], trajectory))
    run, notes = trajectory.directory, list[str]()
    first, second = read_leaps(ledgers.file, run), ledgers.second(run)
    of_first = {_key(one) for one in first}
    others = [leap for leap in _read_gently(second, run, notes) if _key(leap) not in of_first]
    of_step = {snapshot.step: snapshot for snapshot in trajectory.snapshots}
    current = [leap for leap in others if _began_here(leap, of_step.get(leap.origin_step))]
    if len(current) < len(others):
        notes.append(
            f"{second} tells of leaps from snapshots that have changed since, as in a run that was started again:"
            f" {len(others) - len(current)} left out"
        )
    return Known(_marked([*first, *current], trajectory), tuple(notes))


def _marked(recorded_leaps: Sequence[Leap], trajectory: Trajectory) -> tuple[Leap, ...]:
    """Leaps with those of the newest snapshot's marks, which are certain."""
    newest, run = trajectory.origin, str(trajectory.directory)
    marked = dict.fromkeys(map(_steps_of, trainer_of(newest).marks(newest)))
    known = [one.model_copy(update={"is_certain": True}) if _steps(one) in marked else one for one in recorded_leaps]
    others = marked.keys() - {_steps(one) for one in known}
    new = [
        Leap(run=run, origin_step=origin, valid_step=valid, counters=counters, forecast="", is_certain=True)
        for origin, valid, counters in marked
        if (origin, valid, counters) in others
    ]
    return tuple(sorted((*known, *new), key=lambda leap: leap.resumes_after))


def _steps_of(mark: LeapMark) -> tuple[int, int, CountersMode]:
    return mark.origin_step, mark.valid_step, "advance" if mark.step == mark.valid_step else "keep"


def _steps(leap: Leap) -> tuple[int, int, CountersMode]:
    return leap.origin_step, leap.valid_step, leap.counters


def _read_gently(second: Path | None, run: Path, notes: list[str]) -> list[Leap]:
    if second is None:
        return []
    try:
        return read_leaps(second, run)
    except FarcastError as error:
        notes.append(f"caution: {error}; the leaps in it are not considered")
        return []


def _key(leap: Leap) -> tuple[int, int, str, str]:
    """What makes two lines one leap. A project that has moved as a whole names the forecast by another path."""
    return leap.origin_step, leap.valid_step, leap.counters, Path(leap.forecast).name


def _began_here(leap: Leap, origin: Snapshot | None) -> bool:
    return origin is None or not leap.origin_digest or leap.origin_digest == origin.full_digest
