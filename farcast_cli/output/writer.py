"""Files and folders that are invisible until they are whole.

Everything is written under a hidden folder beside its final place, synced to disk, and renamed once. The hidden
folder is locked while it is written: a second writer is refused, and what a killed one left is cleared away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


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
