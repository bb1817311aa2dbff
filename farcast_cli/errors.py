"""What can go wrong, each with its exit code and a hint that mends it.

    FarcastError                 1   (a bug: everything a user can cause has a subclass)
    |-- UsageError               2   an option that makes no sense
    |-- SnapshotError            3   the snapshots cannot be used together
    |   |-- TooFewSnapshotsError
    |   |-- MixedRunsError
    |   |-- StepConflictError
    |   |-- NonFiniteError
    |   |-- SampledError              only a sample of their weights was kept
    |   `-- DataError                 the rows to tune on cannot be used, or do not fit the layer
    |-- FileFormatError          4   a file is unreadable
    |   |-- UnreadableError           ... because the system fails: a bad disk, a filesystem that went away, no memory
    |   |-- HalfWrittenError          ... or is still being saved, or was cut off
    |   |-- NoWeightsError            ... or holds no weights
    |   `-- UnsafeFileError           ... or would run code
    |-- OutputError              5   the output exists, cannot be written, or its path cannot be printed
    |   |-- MemoryUsedUpError           ... or there is not the memory to make it
    |   |-- TakenError                  ... or its name is taken, or another process writes it
    |   `-- RankZeroError               ... or this process is one of several, and the first one tells why there is none
    `-- NoForecastError         10   the run's own history says that a forecast would not help
        `-- NoGainError              a tuning gains nothing significant on rows it has not seen

A fault of the system while an input is read (a bad disk, a network filesystem that goes away, no memory for it) is 4 and
names that input; one while the output is written is 5.

What cannot be printed on stdout is 5 as well, although the files are written: whoever reads the output must not go on with
half of it. A reader that went away, as `head` does, wanted no more: the command ends as it would have. A stream that was
closed from the start takes everything, like /dev/null. What stderr does not take changes nothing.

A message is one line in lower case: what, where, expected against found. The hint says what to do about it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY_COMMAND = "farcast COMMAND "
"""How a command to paste begins that is another one for each command: what runs it names itself there."""
MAX_MESSAGE = 2_000  # characters
MAX_LISTED = 8  # names in a message


class FarcastError(Exception):
    """Anything farcast stops for; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", path: Path | None = None) -> None:
        super().__init__(printable(" ".join(message.split())))
        self._path = path
        self.hint = printable(hint) if len(hint) <= MAX_MESSAGE else ""  # cut short, its quotes would no longer match

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker's error travels to its parent with its hint."""
        return _again, (type(self), str(self), self.hint, self._path)

    def of_rank(self, rank: int) -> FarcastError:
        """The same as the error of one of several processes."""
        return type(self)(f"rank {rank}: {self}", hint=self.hint, path=self.path)

    @property
    def path(self) -> Path | None:
        """The file or folder that it is about: the one that its message begins with, where no other is given."""
        return self._path or _path_in(str(self))


def _again(kind: type[FarcastError], message: str, hint: str, path: Path | None) -> FarcastError:
    return kind(message, hint=hint, path=path)


def _path_in(message: str) -> Path | None:
    """The path before the colon; an option with its value is none, nor are words, nor an address."""
    name, colon, _ = message.partition(": ")
    if not colon or name.startswith("-") or "://" in name:
        return None
    has_form = os.sep in name and not set(name) & set(" '\"`")
    return Path(name) if has_form or os.path.lexists(name) else None


def printable(text: str) -> str:
    """A text as a terminal may show it: names from files may hold escape sequences, and be as long as they like."""
    text = as_addresses(text)
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE - 500]} ... {text[-400:]}"
    return visible(text)


_instead: dict[str, str] = {}
_ONE_SLASH = re.compile(r"\b(s3|gs|gcs|hf|az|abfs|memory):/(?=[^/\s])")
_PASSWORD, _QUERY = re.compile(r"://[^/\s@]+@"), re.compile(r"(://[^\s?'\"`]+)\?[^\s'\"`]+")


def say_instead(path: str, address: str) -> None:
    """Have every text for a person name a folder by the address that it stands for."""
    _instead[path] = address


def as_addresses(text: str) -> str:
    """A text with the addresses in place of the folders that stand for them, with both slashes, and without passwords and queries."""
    for path, address in _instead.items():
        text = text.replace(path, address)
    return _QUERY.sub(r"\1?...", _PASSWORD.sub("://...@", _ONE_SLASH.sub(r"\1://", text)))


def visible(text: str) -> str:
    """A text of any length without what a terminal would obey or cannot show."""
    text = as_addresses(text)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[object], *, most: int = MAX_LISTED) -> str:
    """The first few of several names, and how many more there are.

    >>> listed(["a", "b"], most=2), listed(["a", "b", "c", "d"], most=2)
    ('a, b', 'a, b and 2 more')
    """
    words = [str(name) for name in names]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def shell_word(path: object) -> str:
    """A path as a word of a command to paste: quoted for the shell, and never taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class UsageError(FarcastError):
    """An option or a combination of options that makes no sense."""

    exit_code = 2


class SnapshotError(FarcastError):
    """The snapshots cannot be used, alone or together."""

    exit_code = 3


class TooFewSnapshotsError(SnapshotError):
    """No snapshots, or fewer than a forecast needs."""


class MixedRunsError(SnapshotError):
    """The snapshots are not one run's: names, shapes or steps disagree."""


class StepConflictError(SnapshotError):
    """A snapshot's step is unknown, or two pieces of evidence contradict each other."""


class NonFiniteError(SnapshotError):
    """NaN or infinity among the weights."""


class SampledError(SnapshotError):
    """All weights are needed, and only a sample of them was kept."""


class DataError(SnapshotError):
    """The rows to tune on cannot be used, or do not fit the layer."""


class FileFormatError(FarcastError):
    """A file is not what its name says, is cut short or is damaged."""

    exit_code = 4


class UnreadableError(FileFormatError):
    """The system fails to read a file: nothing is known of what it holds."""


class HalfWrittenError(FileFormatError):
    """A file that ends early, or a part of a snapshot that is missing: it is still being saved, or was cut off."""


class NoWeightsError(FileFormatError):
    """A file of a known format that holds no weights, such as an optimiser's state by itself."""


class UnsafeFileError(FileFormatError):
    """A file asks for code to be run when it is read."""


class OutputError(FarcastError):
    """The output exists, lies where it must not, or cannot be written; or stdout is full, and the result is not printed."""

    exit_code = 5


class MemoryUsedUpError(OutputError):
    """The memory does not suffice."""


class TakenError(OutputError):
    """What is there must stay, or another process is writing the output."""


class RankZeroError(OutputError):
    """Rank 0 ended without an output. It tells why, and all other ranks end with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 ended with code {code}", hint="its own output says why")
        self.exit_code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return RankZeroError, (self.exit_code,)


class UploadError(FarcastError):
    """A store does not take the output; what was uploaded is removed again, or named."""

    exit_code = 6


class NoForecastError(FarcastError):
    """By the run's own history no forecast would be better than the last snapshot."""

    exit_code = 10


class NoGainError(NoForecastError):
    """A tuning gains nothing significant on rows that it has not seen."""
