"""Runs the real command on Linux without what macOS or Windows lacks; answers each call by one JSON line.

    python -m tests.other_systems SYSTEM < CALLS      each line of CALLS is a JSON list: [folder, [argument, ...]]

What a system lacks is removed before farcast is imported, and what it does in another way is done so. Not
imitated: paths with backslashes and drives, rights, real locks.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import resource
import shutil
import signal
import sys
import zoneinfo
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pydantic
import rich.progress
import safetensors.torch
import torch.distributed.checkpoint
import typer

from tests.forks import import_all, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

IMPORTED = (zoneinfo, np, pydantic, rich.progress, safetensors.torch, torch.distributed.checkpoint, typer)
"""Other people's code may ask for whatever it likes; only farcast's is tested."""
SYSTEMS = ("linux", "macos", "windows")
USED: set[str] = set()
"""Which calls of another system were made."""

ONLY_LINUX = (
    *("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "O_DIRECT", "O_TMPFILE", "O_PATH"),
    *("POSIX_FADV_DONTNEED", "POSIX_FADV_WILLNEED", "copy_file_range", "memfd_create", "splice", "setresuid"),
)
NOT_ON_WINDOWS = (
    *("fork", "forkpty", "pread", "pwrite", "preadv", "pwritev", "readv", "writev", "killpg", "setsid", "getsid", "setpgid"),
    *("getpgid", "getuid", "geteuid", "getgid", "getegid", "fchmod", "fchown", "chown", "lchown", "fchdir", "fdatasync"),
    *("sync", "statvfs", "fstatvfs", "mkfifo", "nice", "posix_spawn", "sendfile", "set_blocking", "lockf"),
    *("O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_NONBLOCK", "O_NDELAY", "O_SYNC", "O_DSYNC", "O_NOCTTY"),
)
SIGNALS_OF_WINDOWS = {"SIGABRT", "SIGBREAK", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
F_NOCACHE, F_FULLFSYNC, F_SETFL = 48, 51, fcntl.F_SETFL
O_BINARY = 1 << 30

REAL = ModuleType("real")
"""The calls as they are, for what is to be imitated by them."""
for _name in ("open", "fork", "fsync", "rename", "replace", "unlink", "rmdir", "stat", "scandir", "link", "dup2"):
    setattr(REAL, _name, getattr(os, _name))
_LIBRARY = ctypes.CDLL(None, use_errno=True)


def used(name: str) -> None:
    """For the caller of the command, which is another process."""
    USED.add(name)


# --- what neither has ------------------------------------------------------------------------------------------------


def without_linux(*, has_library: bool) -> None:
    """No calls of Linux's own, no /proc, and another C library or none."""
    remove(os, ONLY_LINUX)

    def library(name: str | None, **_: object) -> Any:
        if name is None and has_library:
            return _Library()
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    put(ctypes, CDLL=library)
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        setattr(os, name, _no_proc(getattr(os, name)))
    builtins.open = _no_proc(builtins.open)


class _Library:
    """The C library of macOS, as far as farcast asks for it."""

    @staticmethod
    def renamex_np(old: bytes, new: bytes, flags: int) -> int:
        used("renamex_np")
        done: int = _LIBRARY.renameat2(-100, old, -100, new, {4: 1, 2: 2}[flags])
        return done


def _no_proc(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(path: Any = ".", *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return call(path, *arguments, **options)

    return called


def put(module: ModuleType, **values: object) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def remove(module: ModuleType, names: Sequence[str]) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


# --- macOS -----------------------------------------------------------------------------------------------------------


def become_macos() -> None:
    without_linux(has_library=True)
    sys.platform = "darwin"
    usage, control = resource.getrusage, fcntl.fcntl

    class InBytes:
        def __init__(self, who: int) -> None:
            self.ru_maxrss = usage(who).ru_maxrss * 1024

    def controlled(fd: int, command: int, *arguments: Any) -> Any:
        if command not in {F_NOCACHE, F_FULLFSYNC}:
            return control(fd, command, *arguments)
        used({F_NOCACHE: "F_NOCACHE", F_FULLFSYNC: "F_FULLFSYNC"}[command])
        return REAL.fsync(fd) if command == F_FULLFSYNC else 0

    def no_fork() -> int:
        raise AssertionError("a fork is not safe on macOS")

    put(os, fork=no_fork)
    put(resource, getrusage=InBytes)
    put(fcntl, fcntl=controlled, F_NOCACHE=F_NOCACHE, F_FULLFSYNC=F_FULLFSYNC)


# --- Windows ---------------------------------------------------------------------------------------------------------


def become_windows() -> None:
    """But for `sys.platform` and `os.name`, which would change how Python itself finds paths; farcast must not ask them."""
    flags, room = fcntl.fcntl, shutil.disk_usage(".")
    without_linux(has_library=False)
    remove(os, NOT_ON_WINDOWS)
    remove(mmap, [name for name in dir(mmap) if name.startswith(("PROT_", "MADV_", "MAP_"))])
    remove(signal, [name for name in dir(signal) if name.startswith("SIG") and name not in SIGNALS_OF_WINDOWS])
    put(signal, SIGBREAK=signal.Signals(10))
    put(os, O_BINARY=O_BINARY)
    os.supports_dir_fd, os.supports_follow_symlinks = set(), {os.stat}
    unimportable: dict[str, Any] = sys.modules
    for name in ("fcntl", "resource", "termios", "pwd", "grp", "tty", "pty"):
        unimportable[name] = None
    sys.modules["msvcrt"] = _locking()
    put(mmap, mmap=_Mapped)
    put(shutil, _use_fd_functions=False)
    put(shutil, disk_usage=lambda _: room)  # Windows has a call of its own

    def opened(path: Any, how: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        _no_folder(dir_fd)
        assert how & O_BINARY, f"{path} is opened as text"
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        fd: int = REAL.open(path, how & ~O_BINARY, mode)
        return fd

    def synced(fd: int) -> None:
        if flags(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        REAL.fsync(fd)

    put(os, open=_no_proc(opened), fsync=synced)
    _rename_as_windows()


def _no_folder(*fds: int | None) -> None:
    if any(fd is not None for fd in fds):
        raise NotImplementedError("dir_fd unavailable on this platform")


def _rename_as_windows() -> None:
    """No name is replaced by the usual rename, no file that is open is removed or gets another name."""

    def renamed(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        _no_folder(src_dir_fd, dst_dir_fd)
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), old, None, new)
        _free(old)
        REAL.rename(old, new)

    def replaced(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        _no_folder(src_dir_fd, dst_dir_fd)
        _free(old)
        _free(new)
        if Path(new).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), old, None, new)
        REAL.replace(old, new)

    def removing(call: Callable[[Any], None]) -> Callable[..., None]:
        def removed(path: Any, *, dir_fd: int | None = None) -> None:
            _no_folder(dir_fd)
            _free(path)
            call(path)

        return removed

    put(os, rename=renamed, replace=replaced, unlink=removing(REAL.unlink), remove=removing(REAL.unlink))
    put(os, rmdir=removing(REAL.rmdir))


def _free(path: Any) -> None:
    """That this process has no file open, or mapped, at or below a path."""
    top = os.path.abspath(path)  # noqa: PTH100 - a link is not followed
    with REAL.scandir("/proc/self/fd") as found:
        held = [str(Path(entry.path).readlink()) for entry in found if os.path.lexists(entry.path)]
    with io.open_code("/proc/self/maps") as maps:
        held += [line.split(maxsplit=5)[5].strip() for line in maps.read().decode().splitlines() if line.count("/")]
    for name in held:
        if name == top or name.startswith(top + "/"):
            raise PermissionError(errno.EACCES, "it is used by another process", path)


class _Mapped(mmap.mmap):
    """A mapping without the arguments and the advice of POSIX."""

    def __new__(cls, fd: int, length: int, *, access: int = mmap.ACCESS_WRITE) -> Self:
        return super().__new__(cls, fd, length, access=access)

    @property
    def madvise(self) -> Any:
        raise AttributeError("madvise")


def _locking() -> ModuleType:
    """msvcrt, as far as farcast asks for it."""
    module, flock = ModuleType("msvcrt"), fcntl.flock
    exclusive = fcntl.LOCK_EX | fcntl.LOCK_NB

    def locking(fd: int, mode: int, num_bytes: int) -> None:
        assert (mode, num_bytes) == (2, 1)
        assert os.lseek(fd, 0, os.SEEK_CUR) >= os.fstat(fd).st_size, "others could not read what is locked"
        used("locking")
        try:
            flock(fd, exclusive)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None

    module.__dict__.update(locking=locking, LK_NBLCK=2)
    return module


# --- the calls -------------------------------------------------------------------------------------------------------


def small_tasks() -> None:
    """Small outputs in many ranges, by several workers and past the page cache, as large ones are."""
    from farcast_cli.engine import output_files, workers, write
    from farcast_cli.forecast import accumulate

    write.RANGE_BYTES, write.MIN_RANGE_BYTES, write.FORK_BYTES = 8192, 4096, 0
    output_files.DIRECT_BYTES = 0
    accumulate.FORK_BYTES, accumulate.SPAN = 0, 4096
    for name in ("in_threads", "in_processes"):
        setattr(workers, name, _told(name, getattr(workers, name)))


def _told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and that it was called."""

    def told(*arguments: Any) -> Any:
        used(name)
        return call(*arguments)

    return told


def run(system: str) -> None:
    {"linux": lambda: None, "macos": become_macos, "windows": become_windows}[system]()
    import_all()  # only now that the system is another one
    small_tasks()
    serve(lambda: sorted(USED))


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        run(sys.argv[1])
