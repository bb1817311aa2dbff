"""The folder in which the ranks of a call meet: small messages, signs of life, and locks that end with their processes.

A message is a file that appears whole, by a rename. Folders are listed to find one, since a network filesystem may keep what it
knows of a name that is not there. Locks are asked only of processes on this machine: some filesystems keep them on each.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from farcast_cli import system
from farcast_cli.files.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LEAVING_S = 10.0  # that ranks wait for one another at the end
_NAME = ".farcast-ranks"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25


class Room:
    """The folder in which ranks meet, as one of them uses it: RANK.STEP is a message, RANK.beat a sign of life, RANK.lock held."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._beats = folder, rank, 0
        self._others: dict[int, bool] = {}
        self._fd = system.open_file(self._at(rank, "lock"), os.O_RDWR | os.O_CREAT, 0o600, follows=False)
        with suppress(OSError):  # a filesystem without locks: only silence tells then
            system.lock(self._fd, waits=False)

    @classmethod
    def within(cls, hidden: Path, rank: int) -> Room:
        """The one in a hidden folder, as another rank finds it.

        Raises:
            OSError: there is none.
        """
        return cls(hidden / _NAME, rank)

    @classmethod
    def made(cls, hidden: Path) -> Room:
        """A new one, of rank 0."""
        draft = hidden / f"{_NAME}.draft"
        draft.mkdir(mode=0o700)
        draft.rename(hidden / _NAME)
        room = cls(hidden / _NAME, 0)
        room.post("machine", {"machine": system.machine()})
        return room

    def _at(self, rank: int, what: str) -> Path:
        return self._folder / f"{rank}.{what}"

    def post(self, step: str, content: Any) -> None:
        draft = self._at(self._rank, f"{step}.draft")
        with os.fdopen(system.open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, follows=False), "wb") as file:
            file.write(json.dumps(content).encode())
            file.flush()
            system.flush(file.fileno())
        draft.replace(self._at(self._rank, step))

    def read(self, rank: int, step: str) -> Any:
        """A message; None where there is none."""
        if f"{rank}.{step}" not in self._listed():
            return None
        with suppress(OSError):
            return parse_json(self._at(rank, step).read_bytes())
        return None

    def names(self) -> set[str]:
        """The messages that are there. A listing is asked anew, where a network filesystem may keep what it knows of a name."""
        return {path.name for path in self._folder.iterdir()}

    def _listed(self) -> set[str]:
        with suppress(OSError):
            return self.names()
        return set()

    def is_there(self) -> bool:
        return "0.lock" in self._listed()

    def beat(self) -> None:
        self._beats += 1
        draft = self._at(self._rank, "beat.draft")
        draft.write_text(str(self._beats), encoding="ascii")
        draft.replace(self._at(self._rank, "beat"))

    def sign_of(self, rank: int) -> str:
        with suppress(OSError):
            return self._at(rank, "beat").read_text(encoding="ascii", errors="replace")
        return ""

    def runs(self, rank: int) -> bool | None:
        """Whether a rank's process runs; None where this machine cannot tell."""
        if rank not in self._others:
            told = self.read(rank, "hello" if rank else "machine")
            self._others[rank] = bool(told) and told["machine"] == system.machine()
        if not self._others[rank]:
            return None
        try:
            fd = system.open_file(self._at(rank, "lock"), os.O_RDWR, follows=False)
        except OSError:
            return None
        try:
            return _is_locked(fd)
        finally:
            os.close(fd)

    def leave(self) -> None:
        """Say that this rank has heard how it ended. Where rank 0 has an error to tell of, and is on this machine, let it tell.

        A launcher ends all others once the first of its processes has failed.
        """
        end, fd = self.read(0, "end"), None
        with suppress(OSError):
            if end and end["code"] and self.runs(0):
                fd = system.open_file(self._at(0, "lock"), os.O_RDWR, follows=False)
        self.close()
        with suppress(OSError):
            self.post("left", {"rank": self._rank})
        if fd is not None:
            wait_a_little(lambda: not _is_locked(fd))
            os.close(fd)

    def close(self) -> None:
        """Give up the lock; once more, also after an interrupt, changes nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _is_locked(fd: int) -> bool | None:
    """Whether another process has the lock; None where there are no locks."""
    try:
        system.lock(fd, waits=False)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def wait_a_little(done: Callable[[], bool]) -> None:
    """Wait for what is not worth more than some seconds."""
    late, later = time.monotonic() + LEAVING_S, pauses()
    while not done() and time.monotonic() < late:
        time.sleep(next(later))


def pauses() -> Iterator[float]:
    """Between two looks, longer and longer."""
    pause = _FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE_S)
