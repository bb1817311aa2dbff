"""The ledger of leaps: which forecasts a run may have resumed from, one line for each.

`predict` and `leap` write a line for every checkpoint to resume from. Whether training did resume from it, the snapshots
tell (`history`). A ledger is JSON lines, because appending a line cannot damage the others. The paths in it are relative to
its folder, so that a project can move as a whole. A second ledger, in the user's state folder, is found from any working
directory (`state_ledger`); its paths are absolute.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farcast_cli import system
from farcast_cli.choices import CountersMode  # noqa: TC001 - pydantic reads the annotations
from farcast_cli.errors import FileFormatError, OutputError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size, local, placed, portable, read_bytes, reading, seen_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_INERT = {ord(mark): f"\\u{ord(mark):04x}" for mark in "$`!"}
"""What a shell obeys between double quotes, as JSON's own escapes. The quotes of JSON are quotes to a shell as well."""
_BEGINNING = '{"run":'
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


class Leap(BaseModel):
    """A published forecast to resume from. In a ledger, `run` and `forecast` are relative to the ledger's folder."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    run: str
    origin_step: int
    valid_step: int
    counters: CountersMode
    forecast: str
    """Empty where only the mark in a snapshot tells of the leap."""
    origin_digest: str = Field(default="", exclude=True)
    """Of the origin, where the ledger says it: an origin that has changed is another run's."""

    is_certain: bool = Field(default=False, exclude=True)
    """Whether the run's own newest snapshot says that it resumed from it."""

    @property
    def name(self) -> str:
        """Of the forecast, for people."""
        return os.path.basename(self.forecast) or "a forecast"  # noqa: PTH119 - of a text, which may be empty

    @property
    def resumes_after(self) -> int:
        """The step that the trainer's counters are at when it resumes."""
        return self.valid_step if self.counters == "advance" else self.origin_step

    def relative_to(self, home: Path) -> Leap:
        return self.model_copy(
            update={
                "run": seen_from(self.run, home),
                "forecast": self.forecast and seen_from(self.forecast, home),
                "origin_digest": "",
                "is_certain": False,
            }
        )

    def as_line(self) -> str:
        """As the ledger holds it: JSON in ASCII, in which no name is a command, even where a shell reads the file."""
        named = self.model_dump() | {"run": portable(self.run), "forecast": portable(self.forecast)}
        named |= {"origin_digest": self.origin_digest} if self.origin_digest else {}
        return json.dumps(named, separators=(",", ":")).translate(_INERT)


@contextmanager
def recorded(ledger: Path, leaps: Sequence[Leap], *, is_private: bool = False) -> Iterator[None]:
    """Append leaps to the ledger; take the lines back if the block, which publishes the forecasts, fails.

    The lines come first: a forecast that a killed process published without its line would be taken for training. A line
    that is there already, because such a process was killed before it published anything, is not written twice.

    Args:
        is_private: the lines bear absolute paths and the origins' digests, and nobody else may read them.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        fd, is_new = _open_locked(ledger, is_private=is_private)
    except OSError as error:
        raise _cannot_be_written(ledger, error) from error
    try:
        before = os.fstat(fd).st_size
        try:
            home = ledger.parent.resolve()
            lines = [(leap if is_private else leap.relative_to(home)).as_line() for leap in leaps]
            after = _append(fd, ledger, lines)
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


def _open_locked(ledger: Path, *, is_private: bool) -> tuple[int, bool]:
    """The ledger, locked where the filesystem has locks, and whether it is new."""
    flags = os.O_RDWR | os.O_APPEND | system.NO_WAIT
    if is_private:
        for folder in reversed([ledger.parent, *ledger.parent.parents]):
            folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    ledger.parent.mkdir(parents=True, exist_ok=True)
    while True:
        is_new = not os.path.lexists(ledger)
        try:
            mode = PRIVATE_FILE if is_private else 0o666
            fd = system.open_file(ledger, flags | (os.O_CREAT | os.O_EXCL) * is_new, mode, follows=False)
        except (FileExistsError, FileNotFoundError):  # made or removed by another process since
            continue
        try:
            with suppress(OSError):
                system.lock(fd)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), ledger.stat(follow_symlinks=False)):
                    return fd, is_new
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # removed by another process since: once more


def _append(fd: int, ledger: Path, lines: Sequence[str]) -> int:
    """Write the lines that are missing; returns the size of the ledger afterwards."""
    content = bytearray(os.fstat(fd).st_size)
    del content[system.read_at(fd, memoryview(content), 0) :]
    missing = [line for line in dict.fromkeys(lines) if line.encode() not in content.split(b"\n")]
    # on a line of its own even if a killed process left half a line
    text = "\n" * bool(content and not content.endswith(b"\n")) + "".join(f"{line}\n" for line in missing)
    raw = text.encode() if missing else b""
    while raw:
        raw = raw[os.write(fd, raw) :]
    system.flush(fd)
    system.sync(ledger.parent)
    return os.fstat(fd).st_size


def _take_back(ledger: Path, fd: int, size: int, *, is_new: bool) -> None:
    if is_new:
        with suppress(OSError):  # Windows removes no file that is open: an empty one stays
            ledger.unlink()
            return
    with suppress(OSError):
        os.ftruncate(fd, size)


def withdraw(ledger: Path, leaps: Sequence[Leap], *, is_private: bool = False) -> None:
    """Blank the lines of leaps that the run did not make after all. Nothing else in the ledger moves.

    Raises:
        OutputError: it cannot be written.
    """
    home = ledger.parent.resolve()
    lines = {(leap if is_private else leap.relative_to(home)).as_line().encode() for leap in leaps}
    try:
        fd = system.open_file(ledger, os.O_RDWR | system.NO_WAIT, follows=False)
        try:
            content = bytearray(os.fstat(fd).st_size)
            del content[system.read_at(fd, memoryview(content), 0) :]
            start = 0
            for line in bytes(content).split(b"\n"):
                if line in lines:
                    system.write_at(fd, memoryview(b" " * len(line)), start)
                start += len(line) + 1
            system.flush(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise _cannot_be_written(ledger, error) from error


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
            its_run, forecast = placed(home, local(leap.run)), placed(home, local(leap.forecast))
        except (ValueError, OSError) as error:
            raise FileFormatError(
                f"{ledger}: line {number}: expected a path: {error}", hint="correct or remove that line"
            ) from error
        if its_run == run.resolve():
            found.append(leap.model_copy(update={"run": str(run), "forecast": str(forecast)}))
    return sorted(found, key=lambda leap: leap.resumes_after)
