"""Renames that cannot lose a file: put one under a name that is free, or swap two in one step.

Where a filesystem cannot do either in one step (NFS, some in user space), hard links do it for files; for folders the old
one is set aside first. `put_back` then ends what a killed process began.

Source: link(2).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from farcast_cli import system

if TYPE_CHECKING:
    from pathlib import Path

ASIDE = "replaced"
"""The name of an old output that was set aside, in the hidden folder of the one that takes its place."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def put(new: Path, final: Path) -> None:
    """Give `new` the name `final`, which must be free.

    Raises:
        FileExistsError: it is taken.
        OSError: the rename failed.
    """
    if system.rename_at_once(new, final, exchanges=False):
        return
    if not new.is_dir() and _link(new, final):
        try:
            new.unlink()
        except BaseException:
            final.unlink()
            raise
        return
    if os.path.lexists(final):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
    new.rename(final)


def swap(new: Path, final: Path) -> None:
    """Give `new` the name `final`; what had that name is in the place of `new`, or set aside beside it, afterwards.

    Raises:
        FileNotFoundError: nothing has that name.
        OSError: the swap failed; both are where they were.
    """
    if system.rename_at_once(new, final, exchanges=True):
        return
    aside = new.with_name(ASIDE)
    if not (final.is_symlink() or final.is_dir() or new.is_dir()) and _link(final, aside):
        new.replace(final)  # there is no moment without a file of that name
        return
    final.rename(aside)
    try:
        new.rename(final)
    except BaseException:
        aside.rename(final)
        raise


def swap_back(new: Path, final: Path) -> None:
    """Undo a swap."""
    aside = new.with_name(ASIDE)
    if not os.path.lexists(aside):
        swap(new, final)
    elif final.is_dir() and not final.is_symlink():
        final.rename(new)
        aside.rename(final)
    else:
        aside.replace(final)


def put_back(hidden: Path, final: Path) -> None:
    """Give an old output its name again, where a process was killed after it had set it aside."""
    aside = hidden / ASIDE
    if os.path.lexists(aside) and not os.path.lexists(final):
        aside.rename(final)


def _link(old: Path, new: Path) -> bool:
    """A second name for a file; False where the filesystem has no such thing."""
    try:
        system.link(old, new)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True
