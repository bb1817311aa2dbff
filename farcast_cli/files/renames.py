"""Renames that cannot lose a file: put one under a name that is free, or swap two in one step.

Where a filesystem cannot do either in one step (NFS, some in user space), hard links do it for files; for folders the old
one is set aside first. `put_back` then ends what a killed process began.

Source: renameat2(2), RENAME_NOREPLACE and RENAME_EXCHANGE; link(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

ASIDE = "replaced"
"""The name of an old output that was set aside, in the hidden folder of the one that takes its place."""
_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
_NOT_KNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


def put(new: Path, final: Path) -> None:
    """Give `new` the name `final`, which must be free.

    Raises:
        FileExistsError: it is taken.
        OSError: the rename failed.
    """
    if _rename(new, final, _NOREPLACE):
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
    if _rename(new, final, _EXCHANGE):
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
        os.link(old, new, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    return True


def _rename(old: Path, new: Path, flags: int) -> bool:
    """One call of renameat2; False where the system or the filesystem does not know the flag."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_KNOWN:
        return False
    raise OSError(number, os.strerror(number), str(new))
