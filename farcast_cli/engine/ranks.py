"""The ranks of one call: processes that a launcher started, on one machine or many, and that write one output together.

Knows the launchers' variables, and how ranks meet. They meet in a folder inside the hidden folder of the output, which all of
them must reach anyway to write their shares: a rank that does not see it could not write either. Each message is a small file
that appears whole, by a rename. No port is opened, and no launcher's own library is needed.

    rank 0                                  every other rank
    makes the hidden folder and the room
                                            hello: what it has planned, and a word of its own
    compares; roll: the words it has heard
    makes a pass's files; ready
    writes its share of the ranges          writes its share, syncs it; part: its checksums
    merges the parts, finishes the files    done: the snapshots are as they were
    publishes, by the usual rename; end     left

A hidden folder that an earlier call left has a room too. A rank knocks at every room that it finds, and belongs to the one whose roll
has its word.

A rank is lost when it ends before its share is there, or has said nothing for as long as ranks wait. On one machine the lock of its
own file tells the former at once; other machines' locks are not asked, since some filesystems keep locks on each machine.

Source: torchrun's, Open MPI's, MPICH's and Slurm's variables, from their documentation.
"""

from __future__ import annotations

import errno
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli import errors, system
from farcast_cli.choices import DEFAULT_RANKS_TIMEOUT
from farcast_cli.engine.room import LEAVING_S, Room, pauses, wait_a_little
from farcast_cli.errors import FarcastError, OutputError, RankZeroError, UsageError, listed, visible
from farcast_cli.files.hidden import marked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

LAUNCHED = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
"""The variables of torchrun, Open MPI, MPICH and Slurm, the innermost launcher first: torchrun runs under srun, not the other way."""
_BEAT_S = 1.0  # between two signs of life, at most a tenth of the patience
_CODE_OF_INTERRUPT = 130
_WHERE = "start every rank with the same command, in a folder that all machines share; --ranks-timeout waits longer"
_DIFFERS = {
    "version": "install the same farcast on every machine",
    "engine": "farcast --version -v names it: install a C compiler on every machine or on none, and set FARCAST_ENGINE alike",
    "files": "the ranks must read the same files, with the same times of change: check for a stale mount or a copy of its own",
    "coefficients": "use one kind of processor, and the same numpy, on every machine",
    "plan": "start every rank with the same command",
}
"""What ranks must agree on, and what to do where they do not."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Which of how many ranks this process is."""

    rank: int = 0
    count: int = 1


def seat_in(environment: Mapping[str, str]) -> Seat | None:
    """The seat that a launcher gave to this process; None where there was no launcher.

    Raises:
        UsageError: its variables make no sense.
    """
    for names in LAUNCHED:
        texts = [environment.get(name) for name in names]
        if None in texts:
            continue
        rank, count = (int(text) if text and text.isascii() and text.isdecimal() and len(text) < 7 else -1 for text in texts)  # noqa: PLR2004
        if not 0 <= rank < count:
            told = ", ".join(f"{name}={visible(str(text))}" for name, text in zip(names, texts, strict=True))
            raise UsageError(f"{told}: expected a rank, and a larger number of ranks", hint="--ranks off works alone")
        return Seat(rank, count)
    return None


class Team:
    """The ranks of a call, as one of them sees them. A process that is alone is the only one of its team.

    Args:
        patience_s: how long a rank waits for another that says nothing.
    """

    def __init__(self, seat: Seat | None = None, patience_s: float = DEFAULT_RANKS_TIMEOUT) -> None:
        self.seat = seat or Seat()
        self._patience_s = patience_s
        self._every_s = min(_BEAT_S, patience_s / 10)
        self._room: Room | None = None
        self._final = ""
        self._words: dict[int, str] = {}
        self._heard: dict[int, tuple[str, float]] = {}
        self._due = 0.0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which makes the output, publishes it and tells of it."""
        return self.seat.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.seat.count == 1

    def takes(self, number: int) -> bool:
        """Whether this rank does task `number`."""
        return number % self.seat.count == self.seat.rank

    # --- rank 0 ------------------------------------------------------------------------------------------------------

    def open(self, places: Sequence[Path], agreed: Mapping[str, str]) -> None:
        """Let the other ranks in, once they have planned what this one has.

        Args:
            places: where the outputs are written, each in its hidden folder.
            agreed: digests of what all must have planned alike, by the names in `_DIFFERS`.

        Raises:
            OutputError: a rank did not come, or has planned something else.
        """
        if self.is_alone:
            return
        self._final = str(places[0].parent.parent / places[0].name)
        self._room = room = Room.made(places[0].parent)
        late, later = time.monotonic() + self._patience_s, pauses(self._every_s)
        while missing := [rank for rank in range(1, self.seat.count) if rank not in self._words]:
            names = room.names()
            if came := [rank for rank in missing if f"{rank}.hello" in names]:
                for rank in came:
                    self._greet(rank, room.read(rank, "hello"), agreed)
                continue
            if ended := next((rank for rank in self._words if room.runs(rank) is False), 0):
                raise self._lost(ended, "ended")
            if time.monotonic() > late:
                which = f"rank{'s' * (len(missing) > 1)} {listed(missing)} of {self.seat.count}"
                raise OutputError(f"{self._final}: {which} did not come within {self._patience_s:g} s", hint=_WHERE)
            time.sleep(next(later))
        self._hear_all(self._words)
        self._room.post("roll", {"words": self._words, "folders": [place.parent.name for place in places]})

    def _greet(self, rank: int, hello: Mapping[str, Any], agreed: Mapping[str, str]) -> None:
        """Take up a rank that has planned the same."""
        assert self._room is not None  # noqa: S101 - inside `open`
        self._room.meet(rank)
        self._words[rank] = str(hello["word"])
        if hello["count"] != self.seat.count:
            raise OutputError(
                f"{self._final}: rank {rank} is one of {hello['count']} ranks, expected one of {self.seat.count}", hint=_WHERE
            )
        for what, hint in _DIFFERS.items():
            if hello["agreed"].get(what) != agreed[what]:
                raise OutputError(f"{self._final}: rank {rank} has other {what} than rank 0; nothing was written", hint=hint)

    def wait(self) -> None:
        """Wait until every other rank is done.

        Raises:
            FarcastError: one has failed, or is lost.
        """
        for rank in range(1, self.seat.count):
            self._message(rank, "done")

    def close(self, error: BaseException | None) -> None:
        """Tell the other ranks how it ended, and give them time to hear it, before the hidden folder is removed."""
        if self._room is None or not self.leads:
            return
        room, self._room = self._room, None
        with suppress(OSError):
            names = room.names() if error else set()
            for rank in range(1, self.seat.count):
                if f"{rank}.hello" in names and (hello := room.read(rank, "hello")):  # some were not taken up yet
                    self._words[rank] = str(hello["word"])
            room.post("end", {"code": _code_of(error), "words": self._words})
            wait_a_little(lambda: room.are_gone(self._words))
        if error is None:
            room.close()  # else the lock ends with this process, which has told of the error then

    # --- the others --------------------------------------------------------------------------------------------------

    @contextmanager
    def joined(self, finals: Sequence[Path], agreed: Mapping[str, str]) -> Iterator[list[Path]]:
        """Work with rank 0; yields where the outputs are written. Ends once rank 0 has published.

        Args:
            finals: the places of the outputs.
            agreed: as for `open`.

        Raises:
            RankZeroError: rank 0 ended without an output, and tells why.
            OutputError: rank 0 did not come, or is lost.
        """
        self._final = str(finals[0])
        self._room, folders = self._let_in(finals[0], agreed)
        try:
            yield [final.with_name(folder) / final.name for final, folder in zip(finals, folders, strict=True)]
            self._room.post("done", {})
            code: int | None = self._end()
        except RankZeroError as error:
            code = error.exit_code
        except BaseException as error:
            told = self._worded(error)
            code = self._confess(told)
            if code is None:
                raise told from error
        finally:
            self._room.leave()
        if code:
            raise RankZeroError(code)

    def _let_in(self, final: Path, agreed: Mapping[str, str]) -> tuple[Room, list[str]]:
        """The room in which rank 0 has this rank on its roll, and the names of the hidden folders."""
        word = secrets.token_hex(8)
        hello = {"word": word, "count": self.seat.count, "agreed": dict(agreed), "machine": system.machine()}
        rooms: dict[Path, Room] = {}
        late = time.monotonic() + self._patience_s
        try:
            for pause in pauses(self._every_s):
                for folder in marked(final):
                    if folder not in rooms and (knocked := self._knock(folder, hello)):
                        rooms[folder] = knocked
                        # rank 0 gives up first, and names who is missing
                        late = time.monotonic() + self._patience_s + LEAVING_S
                for folder, room in rooms.items():
                    roll, end = room.read(0, "roll"), room.read(0, "end")
                    if end and word in end["words"].values():
                        room.leave()
                        del rooms[folder]
                        raise RankZeroError(int(end["code"]))
                    if roll and word in roll["words"].values():
                        room.meet(0)
                        self._hear_all([0])
                        del rooms[folder]
                        return room, [str(name) for name in roll["folders"]]
                    if room.runs(0) is False and room.is_there() and not room.read(0, "end"):
                        raise self._lost(0, "ended")
                if time.monotonic() > late:
                    raise OutputError(
                        f"{self._final}: rank 0 of {self.seat.count} did not come within {self._patience_s:g} s", hint=_WHERE
                    )
                time.sleep(pause)
        finally:
            for room in rooms.values():
                room.close()
        raise AssertionError

    def _knock(self, folder: Path, hello: Mapping[str, Any]) -> Room | None:
        """Say hello in the room of a hidden folder; None where there is no room yet, or none by now."""
        try:
            room = Room.within(folder, self.seat.rank)
            try:
                room.post("hello", hello)
                room.meet(0)
            except BaseException:
                room.close()
                raise
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ESTALE}:
                return None
            raise self._unwritable(error) from error
        return room

    def _worded(self, error: BaseException) -> BaseException:
        """An error of this rank, one of the system in words."""
        assert self._room is not None  # noqa: S101 - inside `joined`
        if not isinstance(error, OSError):
            return error
        return self._unwritable(error) if self._room.is_there() else self._lost(0, "ended")

    def _unwritable(self, error: OSError) -> OutputError:
        where = f"{self._final}: cannot be written: {error.strerror or error}"
        return OutputError(where, hint="check the disk, and that every machine sees the folder")

    def _confess(self, error: BaseException) -> int | None:
        """Tell rank 0 why this rank fails; returns the code that rank 0 ends with, None where it does not tell of the error."""
        assert self._room is not None  # noqa: S101 - inside `joined`
        is_told = isinstance(error, FarcastError)
        what = str(error) if is_told else "interrupted" if _code_of(error) == _CODE_OF_INTERRUPT else f"a bug: {error!r}"
        kind, hint = (type(error).__name__, error.hint) if isinstance(error, FarcastError) else ("OutputError", "")
        with suppress(FarcastError, OSError):
            self._room.post("failed", {"kind": kind, "message": what, "hint": hint})
            return self._end() if is_told else None
        return None

    def _end(self) -> int:
        """The code that rank 0 ends with."""
        return int(self._message(0, "end")["code"])

    # --- all ---------------------------------------------------------------------------------------------------------

    def begin(self, step: str) -> None:
        """Wait until rank 0 has come so far; on rank 0, say that it has."""
        if self._room is not None and self.leads:
            self._room.post(f"ready-{step}", {})
        elif self._room is not None:
            self._message(0, f"ready-{step}")

    def merge(self, step: str, part: Any) -> list[Any]:
        """Hand in a part; returns those of all other ranks on rank 0, and none elsewhere.

        Args:
            part: what JSON holds.
        """
        if self._room is None:
            return []
        if not self.leads:
            self._room.post(f"part-{step}", part)
            return []
        return [self._message(rank, f"part-{step}") for rank in range(1, self.seat.count)]

    @contextmanager
    def handing_in(self, step: str) -> Iterator[BinaryIO]:
        """A file for a part that is too large for a message, on the others; rank 0 has it once the block has ended."""
        assert self._room is not None  # noqa: S101 - inside `joined`
        with self._room.making(step) as file:
            yield file
        self.merge(step, {"bytes": self._room.size_of(self.seat.rank, step)})

    def handed_in(self, step: str) -> Iterator[BinaryIO]:
        """The files of all other ranks on rank 0, in their order; none elsewhere."""
        if self._room is None or not self.leads:
            return
        for rank in range(1, self.seat.count):
            told = self._message(rank, f"part-{step}")
            if (found := self._room.size_of(rank, step)) != told["bytes"]:
                raise OutputError(
                    f"{self._final}: of rank {rank}'s share {found} bytes are here, expected {told['bytes']}", hint=_WHERE
                )
            with self._room.made_by(rank, step) as file:
                yield file

    def beat(self) -> None:
        """Say, now and then, that this rank works, and see whether the others do.

        Raises:
            FarcastError: one has failed, or is lost.
        """
        now = time.monotonic()
        if self._room is None or now < self._due:
            return
        self._due = now + self._every_s
        try:
            self._room.beat()
            names = self._room.names()
        except OSError:
            if self.leads:
                raise
            raise self._lost(0, "ended") from None
        for rank in self._heard:
            self._see(rank, names)

    def _see(self, rank: int, names: set[str]) -> None:
        """See that a rank works."""
        room = self._room
        assert room is not None  # noqa: S101 - inside a call
        if f"{rank}.failed" in names:
            raise _told_by(rank, room.read(rank, "failed"))
        if f"{rank}.end" in names:
            raise RankZeroError(int((room.read(rank, "end") or {"code": OutputError.exit_code})["code"]))
        if f"{rank}.done" in names:
            return
        if room.runs(rank) is False and not {f"{rank}.failed", f"{rank}.end", f"{rank}.done"} & room.names():
            raise self._lost(rank, "ended")
        sign, since = self._heard[rank]
        if (found := room.sign_of(rank, names)) != sign:
            self._heard[rank] = found, time.monotonic()
        elif time.monotonic() - since > self._patience_s:
            raise self._lost(rank, f"has said nothing for {self._patience_s:g} s and was given up")

    def _lost(self, rank: int, how: str) -> OutputError:
        which = f"rank {rank} of {self.seat.count}"
        return OutputError(
            f"{self._final}: {which} {how} before the output was whole; nothing was published",
            hint="its own output may say why; was it killed, for want of memory or by its launcher?",
        )

    def _message(self, rank: int, step: str) -> Any:
        """A message of a rank, once it is there."""
        room = self._room
        assert room is not None  # noqa: S101 - inside a call
        for pause in pauses(self._every_s):
            if (found := room.read(rank, step)) is not None:
                return found
            try:
                self.beat()
            except RankZeroError:
                if step != "end":
                    raise
                continue
            time.sleep(pause)
        raise AssertionError

    def _hear_all(self, ranks: Any) -> None:
        now = time.monotonic()
        self._heard = dict.fromkeys(ranks, ("", now))


def _told_by(rank: int, told: Mapping[str, str]) -> FarcastError:
    """The error of another rank, with its name."""
    kind = getattr(errors, told["kind"], None)
    known = kind if isinstance(kind, type) and issubclass(kind, FarcastError) else OutputError
    return known(told["message"], hint=told["hint"]).of_rank(rank)


def _code_of(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return _CODE_OF_INTERRUPT
    if isinstance(error, (OSError, MemoryError)):
        return OutputError.exit_code
    return error.exit_code if isinstance(error, FarcastError) else FarcastError.exit_code
