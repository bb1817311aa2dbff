"""Hidden folders in which outputs are written: made new each time, marked, locked, and cleared away later if need be.

A hidden folder's name ends in random letters, so that it is never one that somebody else made: no link is followed and
nothing is emptied. A folder that a killed process left is removed by the next one that writes the same output. It must be
a real folder, belong to this user, carry the mark for that output, and be locked by nobody. If the process was killed when
everything was written and synced, and only names were to be given, that is done first.

Source: mkdtemp(3).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import OutputError, TakenError
from farcast_cli.files.renames import ASIDE, put, put_back, swap
from farcast_cli.system import NO_WAIT, Folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MARK = ".farcast-partial"
"""The file in a hidden folder that says that farcast made it; it holds the output's name."""
_GROUP = ".farcast-group"
"""The file in a hidden folder that names the one whose decision holds for it: outputs that are published together have one."""
_READY = ".farcast-ready"
"""That decision: which outputs are to take their names, and what tells the new file and the old one of each."""
_ENDING = ".partial"
_MAX_NAME = 200  # bytes of an output's name that a hidden folder's name repeats; 255 is a usual limit of the whole
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Hidden:
    """A hidden folder of this process. Its lock ends when it is closed, or with the process."""

    folder: Folder

    @property
    def path(self) -> Path:
        return self.folder.path

    def join(self, leader: Path) -> None:
        """Say that another hidden folder, or this one, holds the decision on this output."""
        with open(_GROUP, "xb", opener=self.folder.open) as file:
            file.write(os.fsencode(leader.absolute()))

    def decide(self, outputs: Iterable[tuple[Path, Path]]) -> None:
        """Say, in one step, that outputs are whole and about to take their names: (hidden folder, final place) of each."""
        moves = [
            [os.fspath(folder.absolute()), os.fspath(final.absolute()), identity(folder / final.name), identity(final)]
            for folder, final in outputs
        ]
        draft = f"{_READY}.draft"
        with open(draft, "x", encoding="ascii", opener=self.folder.open) as file:
            file.write(json.dumps(moves))
        self.folder.rename(draft, _READY)

    def withdraw(self) -> None:
        with suppress(FileNotFoundError):
            self.folder.unlink(_READY)

    def remove(self) -> None:
        _remove(self.folder)
        self.folder.close()


def make_hidden(final: Path) -> Hidden:
    """A new hidden folder beside an output. Whoever asks for it has cleared away what is left of an earlier one.

    Raises:
        OSError: the folder cannot be made.
    """
    for _ in range(_TRIES):
        path = final.with_name(f"{_beginning(final)}{secrets.token_hex(4)}{_ENDING}")
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
            found = _take(path, final)
            if found is not None:
                return found
    raise OutputError(f"{final.parent}: cannot create a hidden folder, {_TRIES} tries")


def clear_left(final: Path) -> None:
    """Remove what killed processes left of an output; do first what one of them had decided to do.

    Raises:
        OutputError: another process writes this output.
    """
    for path in list(_others(final)):
        with suppress(OSError), closing(Folder(path)) as folder:  # not ours, not a folder, or gone
            _clear_one(folder, final)


def marked(final: Path) -> Iterator[Path]:
    """The hidden folders of an output that are this user's and bear its mark, those of killed processes among them."""
    for path in list(_others(final)):
        with suppress(OSError), closing(Folder(path)) as folder:
            if folder.is_own() and _mark_of(folder) == os.fsencode(final.name):
                yield path


def _clear_one(folder: Folder, final: Path) -> None:
    if not folder.is_own():
        return
    path = folder.path
    leader = Path(os.fsdecode(_read_small(_GROUP, folder) or os.fsencode(path)))
    try:
        folder.lock(waits=False)
    except BlockingIOError:
        if _mark_of(folder) == os.fsencode(final.name):
            raise TakenError(
                f"{final}: another farcast is writing this output (in {path})", hint="wait for it to end"
            ) from None
        return
    except OSError:  # a filesystem without locks: nobody knows whether its process lives, but an old output is never left aside
        _put_back(leader, path, final)
        return
    if _mark_of(folder) == os.fsencode(final.name):
        for move in _decided(leader):
            with suppress(OSError, TypeError):
                _move(*move)
        _put_back(leader, path, final)
        _remove(folder)
        return
    if _mark_of(folder) == b"":  # a process was killed while it made the mark, or before
        folder.unlink(MARK)
    folder.let_go()
    path.rmdir()  # fails, as it should, if anything else is in it


def _decided(leader: Path) -> list[tuple[Path, Path, Any, Any]]:
    """What a killed process had decided: hidden folder, final place, what tells the new file and the old one of each output."""
    with suppress(OSError, ValueError, TypeError, RecursionError):  # there is no decision, or no readable one
        with closing(Folder(leader)) as opened:
            moves = json.loads(_read_small(_READY, opened) or b"[]") if opened.is_own() else []
        return [(Path(folder), Path(final), new, old) for folder, final, new, old in moves]
    return []


def _move(folder: Path, final: Path, new: Any, old: Any) -> None:
    """Give one output its name, if nothing has changed since that was decided.

    A file that it was to replace must be the very file, unchanged to the last write. A folder is not replaced: what was done
    inside it since cannot be told.
    """
    written = folder / final.name
    if folder not in _others(final) or new is None or identity(written) != new:
        return
    if not os.path.lexists(final):
        put(written, final)
    elif old is not None and final.is_file() and identity(final) == old:
        swap(written, final)


def _put_back(leader: Path, folder: Path, final: Path) -> None:
    """Give an old output its name again that a killed process had set aside; nothing else that lies there."""
    aside = folder / ASIDE
    for its_folder, its_final, _, old in _decided(leader):
        is_it = its_folder == folder.absolute() and its_final == final.absolute()
        if is_it and is_renamed(old, identity(aside)):
            put_back(folder, final)


def _remove(opened: Folder) -> None:
    """Remove a hidden folder, its mark last: what cannot be removed now is still known as ours."""
    folder = opened.path
    opened.let_go()
    with suppress(OSError):
        for entry in list(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != MARK:
                with suppress(OSError):
                    entry.unlink()
        if [entry.name for entry in folder.iterdir()] == [MARK]:
            (folder / MARK).unlink()
        folder.rmdir()


def identity(path: Path) -> list[int] | None:
    """What tells a file, as it is now, from any other and from itself after a change; None if there is none."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return None
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return [found.st_dev, found.st_ino, size, found.st_mtime_ns, found.st_ctime_ns]


def is_renamed(before: Any, after: list[int] | None) -> bool:
    """Whether a file is the one of before under another name; a rename changes the last of what tells a file."""
    return isinstance(before, list) and after is not None and before[:-1] == after[:-1]


def _take(path: Path, final: Path) -> Hidden | None:
    """Lock and mark a new folder; None where another process took it for a leftover first."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(closing(Folder(path)))
            with suppress(OSError):  # a filesystem without locks: no other process clears this folder then
                folder.lock()
            with open(MARK, "xb", opener=folder.open) as mark:
                mark.write(os.fsencode(final.name))
        except FileNotFoundError:
            return None
        except BaseException:
            stack.close()
            shutil.rmtree(path, ignore_errors=True)
            raise
        stack.pop_all()
    return Hidden(folder)


def _others(final: Path) -> Iterator[Path]:
    """What may be hidden folders of an output, by their names."""
    pattern = re.compile(re.escape(_beginning(final)) + r"[0-9a-f]{8}" + re.escape(_ENDING))
    with suppress(OSError), os.scandir(final.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                yield final.with_name(entry.name)


def _beginning(final: Path) -> str:
    raw = os.fsencode(final.name)
    return f".{final.name if len(raw) <= _MAX_NAME else hashlib.sha256(raw).hexdigest()}."


def _mark_of(folder: Folder) -> bytes | None:
    """What the mark in a folder says; None where there is none."""
    return _read_small(MARK, folder)


def _read_small(name: str, folder: Folder) -> bytes | None:
    """A small file in a folder that is open; None where there is none."""
    try:
        fd = folder.open(name, os.O_RDONLY | NO_WAIT)
    except OSError:
        return None
    try:
        return os.read(fd, 1 << 20) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)
