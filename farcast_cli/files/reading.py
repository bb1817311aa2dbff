"""Reading stretches of files the user owns: read-only, checked for length, never mapped.

A file that is cut short while it is read raises an error here; the same under mmap would kill the process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import os
import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from farcast_cli import system
from farcast_cli.errors import FileFormatError, HalfWrittenError, UnreadableError, shell_word

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed import WriteableBuffer

_ADDRESS = re.compile(r"[a-z][a-z0-9]+://")
_LFS_PREFIX = b"version https://git-lfs"
_HINTS = {
    errno.EIO: "the disk or the network filesystem has a fault: try again, or restore the file from another copy",
    errno.ESTALE: "the network filesystem lost the file: try again",
}
STANDING_IN, STOOD_FOR, LOCK_OF_STAND_IN = "files", "address", "lock"
"""Names in the folder of a process that fetches: files that stand for those of a store, the address, the lock."""
LONGEST_NAME = 200  # bytes; most filesystems hold 255, and an ending and the name of a hidden folder add up to 40
_MAX_READ = 1 << 30  # one read call stops short of 2 GiB
FileStretch = tuple[Path, int, int]
"""Bytes of a file: path, first byte, number of bytes."""
InFile = tuple[int, int, Path]
"""Where values lie in a file, as the compiled kernel takes them: descriptor, first byte, path."""
Mark = tuple[int, int, int]
"""What tells a file from the same file after a change: its size, its time of change in ns, its inode (on a store, its version)."""


class Source(Protocol):
    """Where the bytes of a folder come from whose files are here in name and size only."""

    prefix: str
    """What the paths of its files begin with."""

    address: str
    """What it stands for. Its last name is that of the one file or folder at `prefix`, beside which a sidecar may lie."""

    def fetch(self, stretches: Iterable[FileStretch], tell: Callable[[int], None] = ..., /) -> None: ...

    def mark_of(self, path: Path, /) -> Mark | None: ...

    def look_again(self) -> None: ...


_sources: list[Source] = []


def add_source(source: Source) -> None:
    """Have every read of a file in its folder ask it first."""
    _sources.append(source)


def remove_source(source: Source) -> None:
    _sources.remove(source)


def source_of(path: Path) -> Source | None:
    """Where a file's bytes come from; None for a file that is here."""
    found = _on_store(path)
    return found[0] if found and found[1].startswith(found[0].prefix) else None


def _on_store(path: str | Path) -> tuple[Source, str] | None:
    """Whose folder a path is, or lies in, and the path as its files are called there; None for what is here."""
    for text in (os.fspath(path), os.path.realpath(path)) if _sources else ():
        for source in _sources:
            if f"{text}{os.sep}".startswith(source.prefix) and os.pardir not in Path(text).parts:
                return source, text
    return None


def stand_in(path: Path) -> Path | None:
    """The folder of the process that fetches a file's bytes, see `remote.mirror`, by the file's place alone; None for any other.

    Whoever is not that process sees zeros for the bytes that it did not fetch.
    """
    real = os.path.realpath(path)
    if f"{os.sep}{STANDING_IN}{os.sep}" in real:
        for files in Path(real).parents:
            home = files.parent
            if files.name == STANDING_IN and (home / LOCK_OF_STAND_IN).is_file() and (home / STOOD_FOR).is_file():
                return home
    return None


def fetch(stretches: Iterable[FileStretch], tell: Callable[[int], None] = lambda _: None) -> None:
    """See that bytes of files that are not here yet are, in few requests; files that are here cost nothing."""
    wanted: dict[Source, list[FileStretch]] = {}
    known: dict[Path, Source | None] = {}
    for stretch in stretches if _sources else ():
        path = stretch[0]
        if path not in known:
            known[path] = source_of(path)
        if (source := known[path]) is not None:
            wanted.setdefault(source, []).append(stretch)
    for source, found in wanted.items():
        source.fetch(found, tell)


def look_again(paths: Iterable[Path]) -> None:
    """Have the marks of files be those of now."""
    for source in dict.fromkeys(filter(None, map(source_of, paths))):
        source.look_again()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system fails at in this block, it failed at while an input was read: the error names that input.

    Raises:
        UnreadableError: an OSError, which names its own file where it knows one, or memory that does not suffice.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error
    except MemoryError as error:
        raise UnreadableError(
            f"{path}: cannot be read: not enough memory{_size_of(path)}", hint="--threads 1 needs the least memory"
        ) from error


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """What the system says against reading a file; against the file that it names, where it names one."""
    named = error.filename if isinstance(error.filename, str) else path
    return UnreadableError(f"{named}: cannot be read: {error.strerror or error}", hint=_HINTS.get(error.errno or 0, ""))


def _size_of(path: Path) -> str:
    try:
        return f" for its {path.stat().st_size} bytes" if path.is_file() else ""
    except OSError:
        return ""


def portable(name: str | Path) -> str:
    """A path as a file of ours holds it, on each system: with slashes, its bytes as UTF-8, those that are none as surrogates."""
    return os.fsencode(os.fspath(name).replace(os.sep, "/")).decode("utf-8", "surrogateescape")


def relative(path: Path, home: Path) -> str:
    """A path as a file of ours in the folder `home` holds it."""
    return portable(seen_from(path.resolve(), home.resolve()))


def seen_from(path: str | Path, home: Path) -> str:
    """A path relative to a folder. One on a store is its address; from a store, one that is here is absolute.

    As it is, where no path leads there (from one drive of Windows to another).
    """
    named = named_for_good(path)
    if is_address(named) or address_for(home):
        return named
    try:
        return os.path.relpath(path, home)
    except ValueError:
        return os.fspath(path)


def is_address(text: str) -> bool:
    """Whether a text names a place on a store.

    >>> is_address("s3://bucket/run"), is_address("../run"), is_address("C:/run")
    (True, False, False)
    """
    return _ADDRESS.match(text) is not None


def address_for(path: str | Path) -> str | None:
    """The address of what a path stands for; None for what is here."""
    found = _on_store(path)
    if found is None:
        return None
    source, text = found
    folder, inside = source.address.rpartition("/")[0], text[len(source.prefix) :].replace(os.sep, "/")
    return f"{folder}/{inside}" if inside else folder


def named_for_good(path: str | Path) -> str:
    """What names a place in any working directory, and on a store on any machine: its absolute path, or its address."""
    text = os.fspath(path)
    return text if is_address(text) else address_for(text) or os.path.realpath(text)


def placed(home: Path, name: str) -> Path:
    """The place that a file of ours in the folder `home` names, absolute; on a store, the path that stands for it if there is one."""
    if not is_address(name):
        return (home / name).resolve()
    for source in _sources:
        if f"{name}/".startswith(f"{source.address}/"):
            return Path(source.prefix + name[source.address.rindex("/") + 1 :])
    return Path(name)


def local(name: str) -> str:
    """A path out of a file of ours, as this locale spells it.

    Raises:
        UnicodeEncodeError: a ValueError; no path is spelled like this.
    """
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


def open_read_only(path: Path) -> int:
    """A file descriptor for reading; the caller closes it.

    Opening a FIFO would wait for a writer, and a device has no end: only regular files are read. A file that stands for one on a
    store is read by the process that fetches its bytes, and by no other.
    """
    with reading(path):
        if source_of(path) is None and (home := stand_in(path)) is not None:
            address = (home / STOOD_FOR).read_text(encoding="utf-8")
            raise UnreadableError(f"{path}: holds only parts of a file of {address}", hint=f"name the address: {address}")
        fd = system.open_file(path, os.O_RDONLY | system.NO_WAIT)
        is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
    if not is_regular:
        os.close(fd)
        raise FileFormatError(f"{path}: cannot be read: no regular file")
    return fd


def read_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` (bytes) from byte `offset` of an open file."""
    if _sources:
        fetch([(path, offset, len(buffer))])
    done = 0
    while done < len(buffer):
        try:  # not `reading`, whose block costs some microseconds, a good part of a short read
            count = system.read_at(fd, buffer[done : done + _MAX_READ], offset + done)
        except OSError as error:
            raise unreadable(path, error) from error
        if count == 0:
            raise ends_early(path, expected=offset + len(buffer), found=offset + done)
        done += count


@contextmanager
def reading_in_kernel() -> Iterator[None]:
    """What the compiled kernel fails at in this block, it failed at while it read the file that its error names."""
    try:
        yield
    except EOFError as end:
        path, expected, found = end.args
        raise ends_early(path, expected=expected, found=found) from None
    except OSError as error:
        raise unreadable(Path(error.filename), error) from error


class Input(io.FileIO):
    """An input whose faults are no OSErrors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(open_read_only(path), "rb")

    def _fetch(self, size: int | None) -> None:
        if _sources:
            fetch([(self._path, self.tell(), file_size(self._path) if size is None or size < 0 else size)])

    def read(self, size: int | None = -1, /) -> bytes:
        self._fetch(size)
        with reading(self._path):
            return super().read(size) or b""

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        self._fetch(memoryview(buffer).nbytes)
        with reading(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        self._fetch(None)
        with reading(self._path):
            return super().readall() or b""


def open_input(path: Path, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> io.BufferedReader:
    """An input for libraries that read open files, and would take a fault of the disk for a fault of the format."""
    return io.BufferedReader(Input(path), buffer_bytes)


def ends_early(path: Path, *, expected: int, found: int) -> HalfWrittenError:
    return HalfWrittenError(
        f"{path}: file ends early: expected at least {expected} bytes, found {found}",
        hint="the snapshot is incomplete or changed during reading: save it again, or leave it out",
    )


def read_bytes(path: Path, offset: int, num_bytes: int) -> bytes:
    """`num_bytes` bytes of a file from byte `offset` on."""
    (found,) = read_stretches([(path, offset, num_bytes)])
    return found


def read_stretches(stretches: Iterable[FileStretch]) -> Iterator[bytes]:
    """The bytes of stretches of files, one after another; neighbours of the same file open it once."""
    for path, several in itertools.groupby(stretches, key=lambda stretch: stretch[0]):
        fd = open_read_only(path)
        try:
            for _, offset, num_bytes in several:
                buffer = bytearray(num_bytes)
                read_into(fd, memoryview(buffer), offset, path)
                yield bytes(buffer)
        finally:
            os.close(fd)


def sha256_of(path: Path) -> str:
    """Of a whole file, which is read once."""
    with open_input(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_size(path: Path) -> int:
    return mark_of(path)[0]


def mark_of(path: Path) -> Mark:
    source = source_of(path)
    if source is not None and (mark := source.mark_of(path)) is not None:
        return mark
    with reading(path):
        found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def mode_of(path: Path) -> int:
    """A file's or a folder's permissions."""
    with reading(path):
        return stat.S_IMODE(path.stat().st_mode) & 0o777


def refuse_lfs_pointer(path: Path, head: bytes) -> None:
    """Git LFS leaves a text of some 130 bytes where the file should be; say so rather than 'corrupt'."""
    if head.startswith(_LFS_PREFIX):
        raise FileFormatError(
            f"{path}: this is a git-LFS pointer, not the file itself",
            hint=f"git -C {shell_word(path.parent)} lfs pull",
        )


def short_name(name: str) -> str:
    """A name that leaves room for an ending and for the hidden folder of its output; a long one is cut, and ends in a digest.

    >>> short_name("ckpts"), len(short_name("x" * 250))
    ('ckpts', 193)
    """
    raw = os.fsencode(name)
    if len(raw) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:12]
    return f"{raw[:180].decode(errors='ignore')}-{digest}"
