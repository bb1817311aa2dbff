"""The folder in which the ranks of a call meet: small messages, signs of life, and locks that end with their processes.

A message is a file that appears whole, by a rename. Folders are listed to find one, and no name is asked for before it is listed:
a network filesystem may keep for a minute that a name is not there, while opening a folder makes NFS ask the server. Locks are
asked only of processes on this machine: some filesystems keep them on each.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from farcast_cli import system
from farcast_cli.files.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator
    from pathlib import Path
    from typing import BinaryIO

LEAVING_S = 10.0  # that ranks wait for one another at the end
_NAME = ".farcast-ranks"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 1.0  # every look lists the folder, and a filesystem may serve a thousand ranks


class Room:
    """The folder in which ranks meet, as one of them uses it: RANK.STEP is a message, RANK.beat a sign of life, RANK.lock held."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank, self._beats = folder, rank, 0
        self._asked: set[int] = set()
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
        room = cls(draft, 0)
        room.post("machine", {"machine": system.machine()})
        room._folder = draft.rename(hidden / _NAME)
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

    @contextmanager
    def making(self, what: str) -> Iterator[BinaryIO]:
        """A file of this rank, on the disk once the block has ended. A message then tells the others that it is whole."""
        fd = system.open_file(self._at(self._rank, f"{what}.bytes"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            system.flush(file.fileno())

    def made_by(self, rank: int, what: str) -> BinaryIO:
        """The file of another rank."""
        return os.fdopen(system.open_file(self._at(rank, f"{what}.bytes"), os.O_RDONLY, follows=False), "rb")

    def size_of(self, rank: int, what: str) -> int:
        return self._at(rank, f"{what}.bytes").stat().st_size

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
        draft.write_text(f"{self._beats:012}", encoding="ascii")  # of one size, which a filesystem may keep
        draft.replace(self._at(self._rank, "beat"))

    def sign_of(self, rank: int, names: Container[str]) -> str:
        """A rank's last sign of life; "" where `names`, which are there, have none."""
        if f"{rank}.beat" in names:
            with suppress(OSError):
                return self._at(rank, "beat").read_text(encoding="ascii", errors="replace")
        return ""

    def meet(self, rank: int) -> None:
        """Take up a rank that has just spoken. Its lock is asked later if it is on this machine, and is seen to be held now.

        Machines may be copies that name themselves alike, and some filesystems keep locks on each.
        """
        told = self.read(rank, "hello" if rank else "machine")
        if told and told["machine"] == system.machine() and self._holds(rank):
            self._asked.add(rank)

    def runs(self, rank: int) -> bool | None:
        """Whether a rank's process runs; None where this machine cannot tell."""
        return self._holds(rank) if rank in self._asked else None

    def are_gone(self, ranks: Iterable[int]) -> bool:
        """Whether these ranks will touch this folder no more."""
        names = self._listed()
        return all(f"{rank}.left" in names if (runs := self.runs(rank)) is None else not runs for rank in ranks)

    def _holds(self, rank: int) -> bool | None:
        """Whether a rank's lock is held; None where that cannot be told."""
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
        with suppress(OSError):
            self.post("left", {"rank": self._rank})
        self.close()  # last: rank 0 removes the folder then
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


def pauses(longest_s: float = _LONGEST_PAUSE_S) -> Iterator[float]:
    """Between two looks, longer and longer: about a third of what was waited so far."""
    pause = _FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(1.5 * pause, longest_s)
