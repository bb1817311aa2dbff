"""What differs between Linux, macOS and Windows. All other modules ask here, and name no system and no call that one lacks.

Each function uses the best that the system has; its docstring says what happens without that.

Source: open(2), fallocate(2), flock(2), fork(2), prctl(2), renameat2(2), posix_fadvise(2); on macOS fcntl(2) F_NOCACHE and
F_FULLFSYNC, renamex_np(2), getrusage(2); on Windows Python's `msvcrt.locking`.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import platform
import shutil
import signal
import stat
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkContext


def _module(name: str) -> Any:
    """A module of Python's own that some systems lack; None there."""
    try:
        return import_module(name)
    except ImportError:
        return None


_fcntl, _msvcrt, _resource = map(_module, ("fcntl", "msvcrt", "resource"))
_BINARY = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)  # Windows changes the ends of lines without the first
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FOLDER = getattr(os, "O_DIRECTORY", 0)
_OPENS_FOLDERS = bool(_FOLDER and os.open in os.supports_dir_fd)
_IS_MACOS = sys.platform == "darwin"
_PR_SET_PDEATHSIG = 1
_LOCKED_BYTE = 1 << 30  # behind the end of a file: on Windows, nobody else may read a byte that is locked
_LOCK_WAIT_S = 0.05
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}
_AT_FDCWD = -100
_RENAMES = {"renameat2": (1, 2), "renamex_np": (4, 2)}
"""The calls of Linux and of macOS: their flags for a name that must be free, and for an exchange."""
_NOT_KNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}

NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""A flag of `open_file`: a FIFO is not waited for."""
HANGUPS: tuple[signal.Signals, ...] = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name))
"""The signals of a terminal that is closed; SIGBREAK is that of Windows."""
ENDINGS = (signal.SIGINT, signal.SIGTERM, *HANGUPS)
"""The signals that ask a process to end."""
HAS_GROUPS = hasattr(os, "killpg")
"""Whether a command and all that it starts can be ended as one."""


def _libc(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError, TypeError):
        return None


# --- the machine -----------------------------------------------------------------------------------------------------


def num_cores() -> int:
    """Of the processor, as far as this process may use them; all of them where the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def machine() -> str:
    """What tells this machine, until it is started anew, from others: on Linux a number of its own, else its name."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say (Windows)."""
    if _resource is None:
        return None
    peak: int = _resource.getrusage(_resource.RUSAGE_SELF).ru_maxrss
    return peak if _IS_MACOS else peak * 1024


# --- files -----------------------------------------------------------------------------------------------------------


def open_file(path: str | Path, flags: int, mode: int = 0o777, *, follows: bool = True, dir_fd: int | None = None) -> int:
    """A descriptor of a file whose bytes are as they are on the disk; no process that is started has it.

    Args:
        follows: a link; else one is an error. Windows asks first and then opens: another process may come between.

    Raises:
        OSError: ELOOP for a link that is not followed.
    """
    if not follows and not _NO_LINK and _is_link(path):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | _BINARY | (0 if follows else _NO_LINK), mode, dir_fd=dir_fd)


def _is_link(path: str | Path) -> bool:
    """Also one of Windows' own kinds, such as a junction."""
    with suppress(OSError):
        found = os.lstat(path)
        kinds = getattr(found, "st_file_attributes", 0) & stat.FILE_ATTRIBUTE_REPARSE_POINT
        return stat.S_ISLNK(found.st_mode) or bool(kinds)
    return False


if hasattr(os, "preadv"):

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        """Read bytes from a place in a file; returns how many, 0 at its end. One thread uses a descriptor at a time."""
        return os.preadv(fd, [buffer], offset)

else:

    def read_at(fd: int, buffer: memoryview, offset: int) -> int:
        """The same in two calls."""
        os.lseek(fd, offset, os.SEEK_SET)
        with io.FileIO(fd, "rb", closefd=False) as file:
            return file.readinto(buffer) or 0


if hasattr(os, "pwrite"):

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        """Write bytes at a place in a file; returns how many. One thread uses a descriptor at a time."""
        return os.pwrite(fd, data, offset)

else:

    def write_at(fd: int, data: memoryview, offset: int) -> int:
        """The same in two calls."""
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def open_past_cache(path: Path) -> int | None:
    """A descriptor whose writes leave the page cache alone; None where there is none (Windows, some filesystems).

    Linux takes whole pages from memory that begins at a page.
    """
    direct, no_cache = getattr(os, "O_DIRECT", 0), getattr(_fcntl, "F_NOCACHE", None)
    if direct or no_cache is not None:
        with suppress(OSError):
            fd = open_file(path, os.O_WRONLY | direct)
            if not direct:
                _switch_cache_off(fd, no_cache)
            return fd
    return None


def _switch_cache_off(fd: int, command: Any) -> None:
    with suppress(OSError):  # then the writes go through the cache
        _fcntl.fcntl(fd, command, 1)


def open_nameless(folder: Path) -> int | None:
    """A new file without a name, to measure a disk with; None where there is no such thing (macOS, Windows)."""
    flag = getattr(os, "O_TMPFILE", 0)
    with suppress(OSError):
        return os.open(folder, os.O_WRONLY | flag | getattr(os, "O_DIRECT", 0), 0o600) if flag else None
    return None


def reserve(fd: int, path: Path, num_bytes: int) -> None:
    """Reserve space for a file; where that cannot be done (macOS, Windows), see that the disk has as much.

    C's posix_fallocate would write zeros where the filesystem cannot reserve, so the system call is made itself.

    Raises:
        OSError: it has not.
    """
    if not num_bytes:
        return
    fallocate = _libc("fallocate")
    if fallocate is None:
        if shutil.disk_usage(path.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)):
        number = ctypes.get_errno()
        if number not in _CANNOT_RESERVE:
            raise OSError(number, os.strerror(number))


def read_soon(fd: int, offset: int, num_bytes: int) -> None:
    """A hint that bytes of a file will be read; only Linux takes it."""
    with suppress(OSError, AttributeError):
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_WILLNEED)


def write_soon(fd: int, offset: int, num_bytes: int) -> None:
    """A hint that bytes of a file are complete, so that the last sync has little left to do; only Linux takes it."""
    with suppress(OSError, AttributeError):
        os.posix_fadvise(fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def forget(pages: mmap.mmap, offset: int, num_bytes: int) -> None:
    """Let go of the memory that bytes of a mapped file have; a system that cannot be asked decides itself (Windows)."""
    first = offset // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED, first, offset + num_bytes - first)


def flush(fd: int) -> None:
    """Have what was written to a file on the disk; the usual call leaves it in the disk's own cache on macOS."""
    with suppress(OSError, AttributeError):  # a filesystem that knows the usual call only, or another system
        _fcntl.fcntl(fd, _fcntl.F_FULLFSYNC)
        return
    os.fsync(fd)


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk; Windows writes the entries of a folder by itself."""
    if not _OPENS_FOLDERS and path.is_dir():
        return
    try:
        fd = open_file(path, os.O_RDONLY if _OPENS_FOLDERS else os.O_RDWR)  # Windows syncs only what may be written
    except PermissionError:
        if path.is_dir():  # a folder that may be written but not read cannot be synced
            return
        raise
    try:
        flush(fd)
    except OSError as error:
        if path.is_dir() and error.errno in {errno.EINVAL, errno.ENOTSUP}:  # some filesystems cannot sync a folder
            return
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


def is_console(stream: Any) -> bool:
    """Whether a stream is a console of Windows, which takes text and no bytes."""
    kind = getattr(io, "_WindowsConsoleIO", None)
    return kind is not None and isinstance(getattr(stream.buffer, "raw", None), kind)


# --- names -----------------------------------------------------------------------------------------------------------


def rename_at_once(old: Path, new: Path, *, exchanges: bool) -> bool:
    """Give a file or folder a name that is free, or exchange two, in one call; False where there is no such call.

    Windows has none; its usual rename fails where the name is taken.

    Raises:
        FileExistsError: the name is not free.
        OSError: the rename failed.
    """
    for name, flags in _RENAMES.items():
        call = _libc(name)
        if call is None:
            continue
        first, second = os.fsencode(old), os.fsencode(new)
        flag = flags[exchanges]
        failed = call(_AT_FDCWD, first, _AT_FDCWD, second, flag) if name == "renameat2" else call(first, second, flag)
        if not failed:
            return True
        number = ctypes.get_errno()
        if number not in _NOT_KNOWN:
            raise OSError(number, os.strerror(number), str(new))
    return False


def link(old: Path, new: Path) -> None:
    """A second name for a file, and not for what a link leads to.

    Raises:
        OSError: the filesystem has no such thing.
    """
    if os.link in os.supports_follow_symlinks:
        os.link(old, new, follow_symlinks=False)
    else:
        os.link(old, new)


# --- locks -----------------------------------------------------------------------------------------------------------


def lock(fd: int, *, waits: bool = True) -> None:
    """Lock a file; the lock ends with the descriptor, or with the process.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the filesystem has no locks.
    """
    if _fcntl is not None:
        _fcntl.flock(fd, _fcntl.LOCK_EX | (0 if waits else _fcntl.LOCK_NB))
        return
    while not _locks_byte(fd):
        if not waits:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        time.sleep(_LOCK_WAIT_S)


def _locks_byte(fd: int) -> bool:
    os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
    try:
        _msvcrt.locking(fd, _msvcrt.LK_NBLCK, 1)
    except PermissionError:
        return False
    return True


class Folder:
    """An open folder, which no link led to: whatever has its name later, its files are reached in this one.

    Windows opens no folders: there, its files are reached by their paths, and its lock is that of a file in it.
    """

    _LOCK = ".farcast-lock"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._locked: int | None = None
        if _OPENS_FOLDERS:
            self._fd = os.open(path, os.O_RDONLY | _FOLDER | _NO_LINK)
        elif _is_link(path) or not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))

    def is_own(self) -> bool:
        """Whether it belongs to this user; Windows is not asked, whose own rules keep others out."""
        return self._fd is None or os.fstat(self._fd).st_uid == os.geteuid()

    def lock(self, *, waits: bool = True) -> None:
        """Lock it, see `lock`."""
        if self._fd is not None:
            lock(self._fd, waits=waits)
            return
        fd = open_file(self.path / self._LOCK, os.O_RDWR | os.O_CREAT, 0o600, follows=False)
        try:
            lock(fd, waits=waits)
        except BaseException:
            os.close(fd)
            raise
        self._locked = fd

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """A descriptor of a file in it, no link followed."""
        return open_file(self._at(name), flags, mode, follows=False, dir_fd=self._fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._at(old), self._at(new), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        os.unlink(self._at(name), dir_fd=self._fd)

    def let_go(self) -> None:
        """Before it is removed: give up the lock where a file that is open cannot be removed (Windows)."""
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None
            with suppress(OSError):  # another process has locked it by now
                (self.path / self._LOCK).unlink()

    def close(self) -> None:
        self.let_go()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _at(self, name: str) -> str:
        return name if self._fd is not None else os.fspath(self.path / name)


# --- processes and signals -------------------------------------------------------------------------------------------


def fork_context() -> ForkContext | None:
    """What starts workers as copies of this process; None where threads must do.

    Windows has no such call. On macOS, Apple's libraries fail in a copy of a process that has used them.
    """
    if _IS_MACOS or not hasattr(os, "fork"):
        return None
    from multiprocessing import get_context

    return get_context("fork")


def die_with(parent: int) -> None:
    """Ask the system to kill this process when its parent dies, which might be killed without a chance to do so itself."""
    with suppress(OSError):
        if prctl := _libc("prctl"):
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def on_endings(handler: Callable[[int, Any], Any]) -> None:
    """Handle what asks this process to end, besides an interrupt, which Python handles itself."""
    signal.signal(signal.SIGTERM, handler)
    for number in HANGUPS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it, and so do we then
            signal.signal(number, handler)


def end_group(group: int, *, at_once: bool) -> None:
    """Ask a group of processes to end, or end it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL if at_once else signal.SIGTERM)


def group_runs(group: int) -> bool:
    """Whether any process of a group runs. Ended ones that nobody waits for, as in some containers, do not count."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _any_runs(group)


def _any_runs(group: int) -> bool:
    """Whether a group has a process that is no zombie; True where there is no /proc to see it."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        return True
    for process in proc.glob("[0-9]*"):
        with suppress(OSError):  # it ended while we looked
            state, _, its_group = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in {"Z", "X"}:
                return True
    return False
