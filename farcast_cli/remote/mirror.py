"""A folder on this machine that stands for a run on a remote store.

Its files have the names and sizes of the remote ones, and hold no bytes at first: they are sparse. A byte is fetched before it
is read (`files.reading` asks for it), so no hole is ever taken for zeros. At the end of the process the files go.

    CACHE/<digest of the address>/lock        held by the process that uses the address
                                  address     as a text
                                  files/NAME  stands for the address, whose last name is NAME
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
from farcast_cli.errors import OutputError, UnreadableError, UsageError, say_instead
from farcast_cli.files.reading import (
    LOCK_OF_STAND_IN,
    STANDING_IN,
    STOOD_FOR,
    add_source,
    ends_early,
    placed,
    remove_source,
    stand_in,
)
from farcast_cli.remote.spans import Spans, requests
from farcast_cli.remote.store import IN_FLIGHT, RemoteFile, Store, address_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from farcast_cli.files.reading import FileStretch, Mark

EDGE_BYTES = 64 << 10  # of a file's head and end, where the headers are, which are fetched for all files at once
SMALL_BYTES = 1 << 20  # up to which a file is fetched whole when any byte of it is read
CACHE_VARIABLE = "FARCAST_CACHE_DIR"
_ELSEWHERE = f"{CACHE_VARIABLE}=DIR"
_LARGER = f"{CACHE_VARIABLE}=DIR names a folder on a larger disk"
_TORCH = {".pt", ".pth", ".ckpt", ".bin", ".zip", ".distcp"}
_MAX_WAITING = 4096  # requests
_open: dict[Path, Mirror] = {}
"""Of this process, by their homes."""


def mirrored(address: str, *, is_output: bool = False) -> Path:
    """The path that stands for an address: a run's folder, a checkpoint, a file.

    Cost: a list of the files, and the headers of all checkpoints.

    Args:
        is_output: it will be written, and nothing need be there.

    Raises:
        UsageError, SnapshotError, FileFormatError: what `Store.listed` raises.
        OutputError: there is no place for the files, or another process has them.
    """
    known = placed(Path(), address)
    if not is_output and (mirror := mirror_of(known)) is not None and os.path.lexists(known):
        mirror.look_again()
        return known
    return _mirror_at(_cache(address) / hashlib.sha256(address.encode()).hexdigest()[:16], address, is_output=is_output)


def _cache(address: str) -> Path:
    """The folder for the files of all addresses."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).resolve()
    home = os.environ.get("XDG_CACHE_HOME", "")
    try:  # the standard has relative paths ignored
        cache = Path(home) if os.path.isabs(home) else Path.home() / ".cache"  # noqa: PTH117 - of a text
    except RuntimeError as error:
        raise UsageError(f"{address}: a user without a home has no cache folder", hint=_ELSEWHERE) from error
    return cache.resolve() / "farcast" / "remote"


def opened(home: Path, name: str) -> Path:
    """The place that a file of ours in the folder `home` names; what is on a store is opened."""
    address = address_of(name)
    return home / name if address is None else mirrored(address)


def mirror_of(path: Path) -> Mirror | None:
    """The one that a path lies in; None for what is here."""
    return next((mirror for home, mirror in _open.items() if Path(os.path.realpath(path)).is_relative_to(home)), None)


def revived(path: Path) -> Path:
    """A path that may lie in such a folder: the run is opened again if it does, and the path is as it is otherwise."""
    try:
        home = stand_in(path)
    except ValueError:  # a NUL, which no path has: who opens it says so
        return path
    if home is None:
        return path
    _mirror_at(home, (home / STOOD_FOR).read_text(encoding="utf-8"), is_output=False)
    return Path(os.path.realpath(path))


def release() -> None:
    """Remove the files of all addresses that are open; each is opened again when it is next named. The end of a process does this."""
    for home, mirror in list(_open.items()):
        del _open[home]
        mirror.close()


atexit.register(release)


def _mirror_at(home: Path, address: str, *, is_output: bool) -> Path:
    if home in _open:
        _open[home].look_again()
    else:
        store = Store(address, may_be_empty=is_output)
        listed = store.listed()
        try:
            _clear(home.parent)
            _open[home] = Mirror(store, home)
        except OSError as error:
            why = "another farcast command uses this address" if isinstance(error, BlockingIOError) else error.strerror
            raise OutputError(f"{address}: its files have no place in {home}: {why}", hint=_ELSEWHERE) from error
        _open[home].take(listed, with_edges=not is_output)
    return _open[home].place


def _clear(cache: Path) -> None:
    """Remove the files that killed processes left."""
    for left in cache.glob(f"*/{STANDING_IN}"):
        with suppress(OSError):
            fd = system.open_file(left.parent / LOCK_OF_STAND_IN, os.O_RDWR, 0o600)
            try:
                system.lock(fd, waits=False)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(fd)


class Mirror:
    """The folder, and which bytes of its files are here; any thread may ask for more."""

    def __init__(self, store: Store, home: Path) -> None:
        self.store, self.address = store, store.address
        self._home, self._process = home, os.getpid()
        self._files: dict[str, RemoteFile] = {}
        self._here: dict[str, Spans] = {}
        self._guard = threading.RLock()
        self.num_bytes = self.num_requests = 0
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = system.open_file(home / LOCK_OF_STAND_IN, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            system.lock(self._lock, waits=False)
        except OSError:
            os.close(self._lock)
            raise
        (home / STOOD_FOR).write_text(store.address, encoding="utf-8")
        self.root = home / STANDING_IN
        self.place, self.prefix = self.root / store.name, f"{self.root}{os.sep}"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        say_instead(str(self.root), store.folder)
        add_source(self)

    def close(self) -> None:
        """Remove the files; the address stays. A forked worker leaves them to its parent."""
        remove_source(self)
        if os.getpid() == self._process:
            shutil.rmtree(self._home / STANDING_IN, ignore_errors=True)
            os.close(self._lock)

    def take(self, listed: dict[str, RemoteFile], *, with_edges: bool = True) -> None:
        """Have exactly these files, each without a byte where it is new or another version, and their headers."""
        with self._guard:
            for name in self._files.keys() - listed.keys():
                with suppress(OSError):  # the last: a folder that others lie in
                    (self.root / name).unlink()
                    for folder in (self.root / name).parents:
                        if folder != self.root:
                            folder.rmdir()
            new = {name: file for name, file in listed.items() if self._files.get(name) != file}
            try:
                for name, file in new.items():
                    self._make(self.root / name, file.num_bytes)
                    self._here[name] = Spans()
            except OSError as error:
                raise OutputError(f"{self.root / name}: no place for such a file in {self._home}: {error.strerror}") from error
            self._files = dict(listed)
        if with_edges:
            self.fetch([stretch for name, file in new.items() for stretch in self._edges(name, file)])

    @property
    def files(self) -> dict[str, RemoteFile]:
        """Those on the store as they were listed, by their names relative to its folder."""
        return dict(self._files)

    def give_up(self, names: Iterable[str]) -> None:
        """Files of these names are whole here from now on, whatever the store has."""
        with self._guard:
            for name in names:
                self._files.pop(name, None)

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
        self.take(self.store.listed())

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
            gaps = self._gaps(stretches)
            self._check_room(sum(end - begin for found in gaps.values() for begin, end in found))
            needed = ((name, begin, end) for name, found in gaps.items() for begin, end in requests(found))
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

    def _check_room(self, num_bytes: int) -> None:
        free = shutil.disk_usage(self.root).free if num_bytes > SMALL_BYTES else num_bytes
        if free < num_bytes:
            raise OutputError(
                f"{self._home}: no place for {num_bytes} bytes of {self.store.address}: {free} are free", hint=_LARGER
            )

    def _gaps(self, stretches: Iterable[FileStretch]) -> dict[str, list[tuple[int, int]]]:
        """What is not here yet, by files."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for path, offset, count in stretches:
            name = self._name(path)
            if (file := self._files.get(name)) is not None:
                begin, end = (
                    (0, file.num_bytes) if file.num_bytes <= SMALL_BYTES else (offset, min(offset + count, file.num_bytes))
                )
                if gaps := self._here[name].missing(begin, end):
                    wanted.setdefault(name, []).extend(gaps)
        return wanted

    def _fetch_one(self, request: tuple[str, int, int]) -> int:
        name, begin, end = request
        data = self.store.read(self._files[name], begin, end)
        if len(data) > end - begin:
            raise UnreadableError(f"{self.root / name}: cannot be read: the store gave more than the range that was asked for")
        if len(data) < end - begin:
            raise ends_early(self.root / name, expected=end, found=begin + len(data))
        try:
            with (self.root / name).open("r+b") as file:
                file.seek(begin)
                file.write(data)
        except OSError as error:
            raise OutputError(
                f"{self._home}: no place for the bytes of {self.store.address}: {error.strerror}", hint=_LARGER
            ) from error
        return len(data)
