"""A folder on this machine that stands for a run on a remote store.

Its files have the names and sizes of the remote ones, and hold no bytes at first: they are sparse. A byte is fetched before it
is read (`files.reading` asks for it), so no hole is ever taken for zeros. At the end of the process the files go. What stays is
the address: a forecaster or a sidecar that names a place in the folder leads to the run again.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from farcast_cli import system
from farcast_cli.errors import OutputError, say_instead
from farcast_cli.files.reading import add_source, ends_early, remove_source
from farcast_cli.remote.spans import Spans, requests
from farcast_cli.remote.store import IN_FLIGHT, RemoteFile, Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from farcast_cli.files.reading import FileStretch, Mark

EDGE_BYTES = 64 << 10  # of a file's head and end, where the headers are, which are fetched for all files at once
SMALL_BYTES = 1 << 20  # up to which a file is fetched whole when any byte of it is read
_TORCH = {".pt", ".pth", ".ckpt", ".bin", ".zip", ".distcp"}
_MAX_WAITING = 4096  # requests
_ADDRESS, _LOCK, _FILES = "address", "lock", "files"
_open: dict[Path, Mirror] = {}
"""Of this process, by their homes."""


def mirrored(address: str, cache: Path) -> Path:
    """The folder that stands for the run at an address; it lies in the folder `cache`.

    Cost: a list of the files, and the headers of all checkpoints.

    Raises:
        UsageError, SnapshotError, FileFormatError: what `Store.listed` raises.
        OutputError: the folder cannot be made, or another process has it.
    """
    return _mirror_at(cache.resolve() / hashlib.sha256(address.encode()).hexdigest()[:16], address)


def revived(path: Path) -> Path:
    """A path that may lie in such a folder: the run is opened again if it does, and the path is as it is otherwise."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # a NUL, which no path has: who opens it says so
        return path
    for files in real.parents:
        home = files.parent
        if files.name == _FILES and (home / _LOCK).is_file() and (home / _ADDRESS).is_file():
            root = _mirror_at(home, (home / _ADDRESS).read_text(encoding="utf-8"))
            return root if real == root else root / real.relative_to(root)
    return path


def release() -> None:
    """Remove the files of all runs that are open; each is opened again when it is next named. The end of a process does this."""
    for home, mirror in list(_open.items()):
        del _open[home]
        mirror.close()


atexit.register(release)


def _mirror_at(home: Path, address: str) -> Path:
    if home in _open:
        _open[home].look_again()
    else:
        store = Store(address)
        listed = store.listed()
        try:
            _open[home] = Mirror(store, home)
        except OSError as error:
            why = "another farcast command reads this run" if isinstance(error, BlockingIOError) else error.strerror
            raise OutputError(f"{home}: cannot hold the files of {address}: {why}", hint="XDG_CACHE_HOME=DIR") from error
        _open[home].take(listed)
    return _open[home].root


class Mirror:
    """The folder, and which bytes of its files are here; any thread may ask for more."""

    def __init__(self, store: Store, home: Path) -> None:
        self._store, self._home, self._process = store, home, os.getpid()
        self._files: dict[str, RemoteFile] = {}
        self._here: dict[str, Spans] = {}
        self._guard = threading.RLock()
        self.num_bytes = self.num_requests = 0
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = system.open_file(home / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            system.lock(self._lock, waits=False)
        except OSError:
            os.close(self._lock)
            raise
        (home / _ADDRESS).write_text(store.address, encoding="utf-8")
        self.root = home / _FILES / store.address.rsplit("/", 1)[-1]
        self.prefix = f"{self.root}{os.sep}"
        shutil.rmtree(home / _FILES, ignore_errors=True)
        self.root.mkdir(parents=True)
        say_instead(str(self.root), store.address)
        add_source(self)

    def close(self) -> None:
        """Remove the files; the address stays. A forked worker leaves them to its parent."""
        remove_source(self)
        if os.getpid() == self._process:
            shutil.rmtree(self._home / _FILES, ignore_errors=True)
            os.close(self._lock)

    def take(self, listed: dict[str, RemoteFile]) -> None:
        """Have exactly these files, each without a byte where it is new or another version, and their headers."""
        with self._guard:
            for name in self._files.keys() - listed.keys():
                with suppress(OSError):
                    (self.root / name).unlink()
            new = {name: file for name, file in listed.items() if self._files.get(name) != file}
            try:
                for name, file in new.items():
                    self._make(self.root / name, file.num_bytes)
                    self._here[name] = Spans()
            except OSError as error:
                raise OutputError(f"{self.root}: cannot hold the run's files: {error.strerror}") from error
            self._files = dict(listed)
        self.fetch([stretch for name, file in new.items() for stretch in self._edges(name, file)])

    @staticmethod
    def _make(path: Path, num_bytes: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = system.open_file(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, num_bytes)
        finally:
            os.close(fd)

    def _edges(self, name: str, file: RemoteFile) -> Iterator[FileStretch]:
        path = self.root / name
        if file.num_bytes <= EDGE_BYTES or path.suffix == ".safetensors" or path.suffix in _TORCH:
            yield path, 0, EDGE_BYTES
        if path.suffix in _TORCH:
            yield path, max(0, file.num_bytes - EDGE_BYTES), EDGE_BYTES

    def look_again(self) -> None:
        """Ask the store for its files as they are now."""
        self.take(self._store.listed())

    def mark_of(self, path: Path) -> Mark | None:
        """What tells a file from its other versions; None where it is no file of the store."""
        file = self._files.get(self._name(path))
        return None if file is None else (file.num_bytes, file.saved_ns, file.version)

    def _name(self, path: Path) -> str:
        return os.fspath(path).removeprefix(self.prefix).replace(os.sep, "/")

    def fetch(self, stretches: Iterable[FileStretch], tell: Callable[[int], None] = lambda _: None) -> None:
        """See that bytes of files are here: path, first byte, number of bytes. What lies beyond a file's end is left out.

        Raises:
            FileFormatError: the store does not give them, or the file has become shorter.
            OutputError: the disk does not take them.
        """
        with self._guard:
            needed = self._needed(stretches)
            while batch := list(itertools.islice(needed, _MAX_WAITING)):
                for (name, begin, end), num_bytes in zip(batch, self._all_of(batch), strict=True):
                    self._here[name].add(begin, end)
                    self.num_bytes, self.num_requests = self.num_bytes + num_bytes, self.num_requests + 1
                    tell(num_bytes)

    def _all_of(self, batch: list[tuple[str, int, int]]) -> Iterator[int]:
        if len(batch) == 1:
            yield self._fetch_one(batch[0])
            return
        from concurrent.futures import ThreadPoolExecutor  # takes longer to import than the rest of the module

        pool = ThreadPoolExecutor(min(IN_FLIGHT, len(batch)))
        try:
            yield from pool.map(self._fetch_one, batch)
        finally:
            pool.shutdown(cancel_futures=True)

    def _needed(self, stretches: Iterable[FileStretch]) -> Iterator[tuple[str, int, int]]:
        """The requests for what is not here yet."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for path, offset, count in stretches:
            name = self._name(path)
            if (file := self._files.get(name)) is not None:
                begin, end = (
                    (0, file.num_bytes) if file.num_bytes <= SMALL_BYTES else (offset, min(offset + count, file.num_bytes))
                )
                if gaps := self._here[name].missing(begin, end):
                    wanted.setdefault(name, []).extend(gaps)
        for name, gaps in wanted.items():
            yield from ((name, begin, end) for begin, end in requests(gaps))

    def _fetch_one(self, request: tuple[str, int, int]) -> int:
        name, begin, end = request
        data = self._store.read(self._files[name], begin, end)
        if len(data) != end - begin:
            raise ends_early(self.root / name, expected=end, found=begin + len(data))
        try:
            with (self.root / name).open("r+b") as file:
                file.seek(begin)
                file.write(data)
        except OSError as error:
            raise OutputError(
                f"{self._home}: no place for the bytes of {self._store.address}: {error.strerror}",
                hint="XDG_CACHE_HOME=DIR names a folder on a larger disk",
            ) from error
        return len(data)
