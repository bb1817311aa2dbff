"""Reading stretches of files the user owns: read-only, checked for length, never mapped.

A file that is cut short while it is read raises an error here; the same under mmap would kill the process.
"""

from __future__ import annotations

import os
import shlex
import stat
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, HalfWrittenError

if TYPE_CHECKING:
    from pathlib import Path

_LFS_PREFIX = b"version https://git-lfs"
_MAX_READ = 1 << 30  # one read call stops short of 2 GiB


def open_read_only(path: Path) -> int:
    """A file descriptor for reading; the caller closes it.

    Opening a FIFO would wait for a writer, and a device has no end: only regular files are read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileFormatError(f"{path}: cannot be read: no regular file")
    return fd


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` (bytes) from byte `offset` of an open file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done : done + _MAX_READ]], offset + done)
        if count == 0:
            raise ends_early(path, expected=offset + len(buffer), found=offset + done)
        done += count


def ends_early(path: Path, *, expected: int, found: int) -> HalfWrittenError:
    return HalfWrittenError(
        f"{path}: file ends early: expected at least {expected} bytes, found {found}",
        hint="the snapshot is half-written or was changed while it was read: save it again, or leave it out",
    )


def read_bytes(path: Path, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` bytes of a file from byte `offset` on."""
    fd = open_read_only(path)
    try:
        buffer = bytearray(num_bytes)
        read_into(fd, memoryview(buffer), offset, path)
    finally:
        os.close(fd)
    return bytes(buffer)


def file_size(path: Path) -> int:
    return mark_of(path)[0]


Mark = tuple[int, int, int]
"""What tells a file from the same file after a change: its size, its time of change in ns, its inode."""


def mark_of(path: Path) -> Mark:
    try:
        found = path.stat()
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ino


def mode_of(path: Path) -> int:
    """A file's or a folder's permissions."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror}") from error


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Git LFS leaves a text of some 130 bytes where the file should be; say so rather than 'corrupt'."""
    if head.startswith(_LFS_PREFIX):
        raise FileFormatError(
            f"{path}: this is a git-LFS pointer, not the file itself",
            hint=f"git -C {shlex.quote(str(path.parent))} lfs pull",
        )
