"""Outputs on their way to a store. It has no rename: each file can be seen when it is whole, and the file that decides comes last.

That file is the one without which no loader takes a folder for a checkpoint: a `.metadata`, or weights with their index.
"""

from __future__ import annotations

import fnmatch
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from farcast_cli.errors import FarcastError, TakenError, UploadError, listed
from farcast_cli.files.place import SIDECAR
from farcast_cli.remote.mirror import mirror_of
from farcast_cli.remote.store import hint_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from farcast_cli.files.staged import Staging
    from farcast_cli.remote.mirror import Mirror
    from farcast_cli.remote.store import Upload

_DECIDING = (".metadata", "*.index.json")
"""All of these come last, and one file of weights too if there is no `.metadata`: some loaders read shards without their index."""
_WEIGHTS = ("model*.safetensors", "*model*", "*.safetensors", "*")
PART_BYTES = 16 << 20  # of a file, in memory at once; 10,000 parts are the most that S3 takes
MAX_PARTS = 9_000
FILES_AT_ONCE = 4


@dataclass(slots=True)
class _Sent:
    """A file: where it is, its name on the store, and how far it is."""

    path: Path
    name: str
    decides: bool
    open: Upload | None = None

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size


@dataclass(slots=True)
class Uploading:
    """The outputs of one address."""

    mirror: Mirror
    files: list[_Sent] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    """The names of the files and folders that are the outputs."""
    begun: list[str] = field(default_factory=list)
    """The names that may be on the store, put there by this process."""

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def send(self, tell: Callable[[int], None]) -> None:
        """Remove what is replaced; send all files, of those that decide all but the last stretch.

        Raises:
            UploadError: the store does not take them.
        """
        from concurrent.futures import ThreadPoolExecutor  # takes longer to import than the rest of the module

        store = self.mirror.store
        with self._failing():
            for name in self._replaced():
                store.remove(name)
            first = [file for file in self.files if not file.decides]
            pool = ThreadPoolExecutor(min(FILES_AT_ONCE, max(1, len(first))))
            try:
                for _ in pool.map(lambda file: self._send(file, tell), first):
                    pass
            finally:
                pool.shutdown(cancel_futures=True)
            for file in self.files:
                if file.decides:
                    self._send(file, tell)
            store.check_sizes({file.name: file.num_bytes for file in first})

    def _send(self, file: _Sent, tell: Callable[[int], None]) -> None:
        num_bytes = file.num_bytes
        file.open = self.mirror.store.upload(file.name, max(PART_BYTES, -(-num_bytes // MAX_PARTS)))
        with file.path.open("rb") as content:
            while part := content.read(PART_BYTES):
                file.open.write(part)
                tell(len(part))
        if not file.decides:
            self._show(file, file.open)

    def _replaced(self) -> list[str]:
        """What has the outputs' names on the store, the files that decide first: all of it was looked at and may be replaced.

        Raises:
            TakenError: something is there that was not there, or another version of it.
        """
        known, now = self.mirror.files, self.mirror.store.listed()
        found = sorted(filter(self._is_output, known.keys() | now.keys()), key=lambda name: not _decides(name))
        for name in found:
            if known.get(name) != now.get(name):
                raise self._taken(name)
        return found

    def _is_output(self, name: str) -> bool:
        return any(f"{name}/".startswith(f"{output}/") for output in self.outputs)

    def _taken(self, name: str) -> TakenError:
        return TakenError(
            f"{self.mirror.store.folder}/{name}: changed on the store while the forecast was made",
            hint="-o OUT writes elsewhere",
        )

    def _show(self, file: _Sent, sent: Upload) -> None:
        """Let a file be seen, where nothing has its name."""
        if self.mirror.store.has(file.name):
            raise self._taken(file.name)
        self.begun.append(file.name)
        sent.close()

    @contextmanager
    def decided(self) -> Iterator[None]:
        """Let the files that decide be seen, while the outputs get their names here."""
        with self._failing():
            for file in self.files:
                if file.decides and file.open is not None:
                    self._show(file, file.open)
            self.mirror.store.check_sizes({file.name: file.num_bytes for file in self.files if file.decides})
        yield
        self.mirror.give_up(filter(self._is_output, [*self.mirror.files, *self.begun]))

    def end(self, failure: BaseException | None) -> None:
        """Remove from the store what a failure has left there, the files that decide first.

        Raises:
            UploadError: it is still there; its text has the names.
        """
        if failure is None:
            return
        for file in self.files:
            if file.open is not None:
                with suppress(Exception):  # each store has errors of its own, and the removal below tells
                    file.open.abort()
        left, why = [], ""
        begun = [file.name for file in self.files if file.name in self.begun]
        last = {file.name for file in self.files if file.decides}
        for name in sorted(begun, key=lambda name: name not in last):
            try:
                self.mirror.store.remove(name)
            except Exception as error:  # noqa: BLE001 - the same
                left.append(f"{self.mirror.store.folder}/{name}")
                why = f"{type(error).__name__}: {error}"
        if left:
            raise UploadError(
                f"{failure}; of the files begun, these may still be there: {listed(left)}: {why}",
                hint="remove them, and uploads that are not finished, when the store answers again",
            ) from failure

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except FarcastError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UploadError(
                f"{self.mirror.store.address}: cannot be written: {type(error).__name__}: {error}", hint=hint_for(error)
            ) from error


def uploads_of(outputs: Staging) -> list[Uploading]:
    """What was written for a store, by addresses; none for outputs that stay here."""
    found = dict[str, Uploading]()
    for written, final in outputs.written:
        mirror = mirror_of(final)
        if mirror is not None:
            one = found.setdefault(mirror.address, Uploading(mirror))
            one.outputs.append(final.relative_to(mirror.root).as_posix())
            one.files += _files_of(written, one.outputs[-1])
    return list(found.values())


def _files_of(written: Path, name: str) -> Iterator[_Sent]:
    if written.is_file():
        yield _Sent(written, name, decides=not name.endswith(f".{SIDECAR}"))
        return
    inside = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    chosen = deciding(inside)
    yield from (_Sent(written / one, f"{name}/{one}", decides=one in chosen) for one in inside)


def deciding(names: Sequence[str]) -> set[str]:
    """Which files of a checkpoint come last.

    >>> sorted(deciding(["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]))
    ['model-00001-of-00002.safetensors', 'model.safetensors.index.json']
    >>> sorted(deciding(["farcast.json", "model.safetensors", "optimizer.pt"]))
    ['model.safetensors']
    """
    found = {name for name in names if _decides(name)}
    if any(name.endswith(_DECIDING[0]) for name in found):
        return found
    others = sorted(name for name in names if not name.endswith(".json"))
    for pattern in _WEIGHTS:
        if one := next((name for name in others if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)), ""):
            return found | {one}
    return found or set(names[-1:])


def _decides(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in _DECIDING)
