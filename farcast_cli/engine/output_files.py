"""Output files that are written in ranges, at known offsets, in any order and from several processes.

Space is reserved first, so that a full disk is found before a byte is written. Large files are written past the page cache
where the system allows it: a forecast is read once, much later, and copying it into the cache costs as much
as computing it. Where it does not, writing through the cache does the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from farcast_cli import system
from farcast_cli.engine.reader import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import Io


DIRECT_BYTES = 16 << 20  # of a file, from which on it is written past the cache; a small one is likely to be read soon
_MAX_OPEN = 64
_NOT_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def create(path: Path, num_bytes: int, *, mode: int = 0o666, folder_mode: int = 0o777) -> None:
    """Make a file with space for so many bytes, and the folders above it that are missing.

    Raises:
        OSError: it exists, or there is no space; it names the file.
    """
    for folder in reversed([above for above in path.parents if not above.exists()]):
        folder.mkdir(mode=folder_mode)
    fd = system.open_file(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with _naming(path):
            system.reserve(fd, path, num_bytes)
    finally:
        os.close(fd)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """System calls on a descriptor do not know the file's name; an error of this block does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def finish_file(path: Path, num_bytes: int, filled_in: Iterable[tuple[int, bytes]]) -> None:
    """Cut a file to its size and fill in what was not known before the rest was written, (position, bytes)."""
    fd = system.open_file(path, os.O_WRONLY)
    try:
        with _naming(path):
            for position, data in filled_in:
                _write_all(fd, np.frombuffer(data, np.uint8), position)
            os.ftruncate(fd, num_bytes)
    finally:
        os.close(fd)


def write_rate(folder: Path, num_bytes: int = 32 << 20) -> float | None:
    """Bytes a second that a folder's disk takes, from a file that never has a name; None if that cannot be measured."""
    fd = system.open_nameless(folder)
    if fd is None:
        return None
    buffer = Buffer(num_bytes)
    try:
        started = time.monotonic()
        _write_all(fd, buffer.at(0, num_bytes), 0)
        system.flush(fd)
        return num_bytes / max(time.monotonic() - started, 1e-9)
    except OSError:
        return None
    finally:
        os.close(fd)


class Buffer:
    """Page-aligned memory for a range, with a page before and behind for elements that reach over its borders."""

    def __init__(self, num_bytes: int) -> None:
        self._size = num_bytes
        self._all = np.frombuffer(mmap.mmap(-1, num_bytes + 2 * PAGE), np.uint8)

    @property
    def num_bytes(self) -> int:
        return len(self._all)

    def at(self, begin: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes from position `begin` of the range, which may be a little below 0."""
        assert -PAGE <= begin <= begin + num_bytes <= self._size + PAGE  # noqa: S101 - our own arithmetic
        return self._all[PAGE + begin : PAGE + begin + num_bytes]


class OutputFiles:
    """Writes ranges of output files; keeps them open. Each process and thread has its own."""

    def __init__(self, io: Io) -> None:
        self._io = io
        self._open: dict[Path, tuple[int, bool]] = {}

    def write(self, path: Path, offset: int, buffer: Buffer, num_bytes: int, *, file_bytes: int) -> None:
        """Write the first bytes of a range; `offset` is a multiple of a page, and so is the length but at the file's end."""
        fd, is_direct = self._file(path, file_bytes)
        if is_direct:
            whole = -(-num_bytes // PAGE) * PAGE  # what lies behind the end is cut off when the file is finished
            try:
                with _naming(path):
                    _write_all(fd, buffer.at(0, whole), offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                fd = self._reopen(path)
            else:
                return
        with _naming(path):
            _write_all(fd, buffer.at(0, num_bytes), offset)
        system.write_soon(fd, offset, num_bytes)

    def close(self) -> None:
        for fd, _ in self._open.values():
            os.close(fd)
        self._open.clear()

    def _file(self, path: Path, file_bytes: int) -> tuple[int, bool]:
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open)))[0])
            self._open[path] = self._open_for(path, file_bytes)
        return self._open[path]

    def _open_for(self, path: Path, file_bytes: int) -> tuple[int, bool]:
        if self._io != "pread" and file_bytes >= DIRECT_BYTES:
            fd = system.open_past_cache(path)  # some filesystems refuse to open such a file, others to write to it
            if fd is not None:
                return fd, True
        return system.open_file(path, os.O_WRONLY), False

    def _reopen(self, path: Path) -> int:
        """The same file through the page cache from now on."""
        os.close(self._open.pop(path)[0])
        self._open[path] = system.open_file(path, os.O_WRONLY), False
        return self._open[path][0]


def _write_all(fd: int, data: NDArray[np.uint8], offset: int) -> None:
    """One call may write less than it is given; a direct write that cannot go on from there is refused (EINVAL)."""
    done = 0
    while done < len(data):
        count = system.write_at(fd, data[done:].data, offset + done)
        if not count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        done += count
