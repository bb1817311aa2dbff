"""Snapshots of which only what tells their step is kept in memory: their tensors are read again when they are asked for.

A thousand snapshots of five thousand tensors are five million entries, more than a gigabyte. Few of them are ever looked at:
what most snapshots are asked is whether their tensors are those of their neighbour, which a fingerprint answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from farcast_cli.errors import SnapshotError
from farcast_cli.formats.safetensors_file import Header, StoredTensors
from farcast_cli.tensors import TensorEntry
from farcast_cli.trainers.base import read_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from farcast_cli.files.reading import Mark
    from farcast_cli.trainers.base import Layout, Snapshot

MAX_OPEN = 200_000  # tensors of all snapshots of a run together that are held at once, some 300 bytes each
_KEPT = 2  # snapshots read last: neighbours are compared


@dataclass(slots=True)
class Shelf:
    """Reads a run's closed snapshots again, and keeps the last few open."""

    layout: Layout
    _open: dict[Path, Snapshot] = field(default_factory=dict)

    def take(self, path: Path, marks: Mapping[Path, Mark]) -> Snapshot:
        """The snapshot at a path.

        Raises:
            SnapshotError: it is not what it was.
        """
        if path not in self._open:
            found = read_snapshot(self.layout, path)
            if found.marks != marks:
                raise SnapshotError(
                    f"{path}: changed while the folder was read",
                    hint="wait until the trainer has saved it, then run the command again",
                )
            while len(self._open) >= _KEPT:
                self._open.pop(next(iter(self._open)))
            self._open[path] = found
        return self._open[path]


Outline = bytes | tuple[Header, ...]


class ClosedTensors(Mapping[str, TensorEntry]):
    """The tensors of a closed snapshot. `outline` is the same for two snapshots if names, types, shapes and orders are."""

    __slots__ = ("_count", "_marks", "_path", "_shelf", "outline")

    def __init__(self, snapshot: Snapshot, shelf: Shelf) -> None:
        self._shelf, self._path, self._marks = shelf, snapshot.path, snapshot.marks
        self._count, self.outline = len(snapshot.tensors), _outline_of(snapshot)

    def read(self) -> Snapshot:
        """The whole snapshot."""
        return self._shelf.take(self._path, self._marks)

    def __getitem__(self, name: str) -> TensorEntry:
        return self.read().tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.read().tensors)

    def __len__(self) -> int:
        return self._count


def closed(snapshot: Snapshot, shelf: Shelf) -> Snapshot:
    """The same without its tensors and the contents of its files."""
    if isinstance(snapshot.tensors, ClosedTensors):
        return snapshot
    parts = tuple(replace(part, content=None, averages=()) for part in snapshot.parts)
    source = snapshot.source and replace(snapshot.source, states=())
    return replace(snapshot, parts=parts, tensors=ClosedTensors(snapshot, shelf), source=source)


def reopened(snapshot: Snapshot) -> Snapshot:
    """The same with its tensors and the contents of its files."""
    if not isinstance(snapshot.tensors, ClosedTensors):
        return snapshot
    found = snapshot.tensors.read()
    return replace(found, evidence=snapshot.evidence, step=snapshot.step, step_source=snapshot.step_source)


def are_alike(before: Snapshot, after: Snapshot) -> bool:
    """Whether two snapshots have the same tensors in the same order, which headers or fingerprints tell; False says nothing."""
    one, other = _known_outline(before), _known_outline(after)
    return one is not None and one == other


def _known_outline(snapshot: Snapshot) -> Outline | None:
    if isinstance(snapshot.tensors, StoredTensors):
        return snapshot.tensors.headers
    return snapshot.tensors.outline if isinstance(snapshot.tensors, ClosedTensors) else None


def _outline_of(snapshot: Snapshot) -> Outline:
    if isinstance(snapshot.tensors, StoredTensors):
        return snapshot.tensors.headers
    whole = hashlib.sha256()
    for entry in snapshot.tensors.values():
        whole.update(repr((entry.name, entry.dtype.name, entry.shape, entry.strides)).encode())
    return whole.digest()
