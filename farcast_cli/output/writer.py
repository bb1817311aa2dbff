"""Files and folders that are invisible until they are whole.

Everything is written under a hidden folder beside its final place, synced to disk, and renamed once. The hidden
folder is locked while it is written: a second writer is refused, and what a killed one left is cleared away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator

SYNC_BYTES = 64 << 20  # written between two hints to the kernel, so that the last sync has little left to do


@contextmanager
def staged(final: Path, *, overwrite: bool = False, may_stay_empty: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `final` when the block ends well and vanishes when it does not.

    Args:
        may_stay_empty: the block may decide to write nothing; then nothing is published.

    Yields:
        a path of the same name that does not exist yet, to be made a file or a folder.

    Raises:
        OutputError: `final` exists (and `overwrite` is not set), or the place cannot be written.
    """
    if not overwrite:
        refuse_existing(final)
    hidden = final.parent / f".{final.name}.partial"
    parent_is_new = not final.parent.exists()
    lock = _lock(hidden)
    try:
        try:
            _clear(hidden)
            yield hidden / final.name
            if (hidden / final.name).exists() or not may_stay_empty:
                _sync_tree(hidden / final.name)
                _publish(hidden / final.name, final, overwrite=overwrite)
        except OSError as error:
            raise OutputError(f"{final}: cannot be written: {error.strerror or error}", hint=_space_hint(error)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)
        if parent_is_new:
            with suppress(OSError):  # not empty: something was published there
                final.parent.rmdir()


def refuse_existing(final: Path) -> None:
    if os.path.lexists(final):
        raise OutputError(f"{final}: exists already", hint="--overwrite replaces it; -o OUT writes elsewhere")


def _lock(hidden: Path) -> int:
    """Make the hidden folder and lock it; the lock ends with its descriptor, or with the process."""
    try:
        hidden.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir(exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{hidden.parent}: cannot be written: {error.strerror}", hint="choose another place with -o"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(f"{hidden}: another farcast is writing this output", hint="wait for it to end") from error
    except OSError:  # a filesystem without locks; the rename is still atomic
        return lock
    return lock


def _clear(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _space_hint(error: OSError) -> str:
    return "free some space, or choose another disk with -o" if error.errno == 28 else "choose another place with -o"  # noqa: PLR2004 - ENOSPC


def _publish(temporary: Path, final: Path, *, overwrite: bool) -> None:
    """One rename. A folder cannot be renamed over another, so an old one steps aside first."""
    aside = temporary.with_name("replaced")
    if overwrite and final.is_dir() and not final.is_symlink():
        final.rename(aside)
    elif not overwrite:
        refuse_existing(final)
    try:
        temporary.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    _sync(final.parent)


def _sync_tree(top: Path) -> None:
    if top.is_file():
        _sync(top)
    for root, _, names in os.walk(top):
        for name in names:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if path.is_dir() and error.errno in {22, 95}:  # EINVAL, ENOTSUP: some filesystems cannot sync a folder
            return
        raise
    finally:
        os.close(fd)


class Sink:
    """Where the bytes of one output file go, record by record, in order."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb", buffering=0)
        self._unsynced = 0
        self._checksum = 0
        self._checksums_at: tuple[int, ...] = ()
        self._filled_in: list[tuple[int, int]] = []

    def begin(self, checksums_at: tuple[int, ...] = ()) -> None:
        """Start a record whose CRC-32 belongs to these positions of the file."""
        self._end_record()
        self._checksum, self._checksums_at = 0, checksums_at

    def write(self, data: memoryview) -> None:
        if self._checksums_at:
            self._checksum = zlib.crc32(data, self._checksum)
        while data:
            data = data[self._file.write(data) :]
        self._unsynced = _start_writeback(self._file.fileno(), self._file.tell(), self._unsynced)

    def close(self) -> None:
        self._end_record()
        for position, checksum in self._filled_in:
            os.pwrite(self._file.fileno(), checksum.to_bytes(4, "little"), position)
        self._file.close()

    def _end_record(self) -> None:
        self._filled_in += [(position, self._checksum) for position in self._checksums_at]
        self._checksums_at = ()


def _start_writeback(fd: int, position: int, unsynced: int) -> int:
    """Let the kernel start writing what is complete; returns from where on it is still to do."""
    if position - unsynced < SYNC_BYTES:
        return unsynced
    with suppress(OSError, AttributeError):
        os.posix_fadvise(fd, unsynced, position - unsynced, os.POSIX_FADV_DONTNEED)
    return position
