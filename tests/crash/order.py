"""What a power cut could still undo, by the calls of a run: what is synced before it is published, and what after.

Source: fsync(2), rename(2). A file's content is safe once the file is synced, its name once the folder is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from tests.crash.judge import is_hidden, is_log
from tests.crash.shim import PARTIAL_WRITES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.crash.shim import Call
    from tests.crash.sweep import Swept

CHANGES = {*PARTIAL_WRITES, "ftruncate", "fallocate"}


@dataclass(slots=True)
class Disk:
    """The paths, relative to the work folder, whose content is not on the disk yet; a folder's content is its names."""

    known: set[str]
    unsynced: set[str] = field(default_factory=set)
    early: list[str] = field(default_factory=list)
    """What was published before it was synced."""

    def apply(self, call: Call, path: str, second: str) -> None:
        if call.kind in {"create", "mkdir", "link"}:
            self._add(second if call.kind == "link" else path)
        elif call.kind in CHANGES:
            self.unsynced.add(path)
        elif call.kind == "fsync":
            self.unsynced.discard(path)
        elif call.kind in {"rename", "exchange"}:
            self._move(path, second, both=call.kind == "exchange")
        elif call.kind in {"unlink", "rmdir"}:
            self.unsynced.discard(path)
            self.known.discard(path)

    def _add(self, path: str) -> None:
        """A name that comes into a folder. One that is hidden only matters where the folder is hidden too."""
        if path in self.known:
            return
        self.known.add(path)
        self.unsynced.add(path)
        self._note_name(path)

    def _note_name(self, path: str) -> None:
        parent = str(PurePosixPath(path).parent)
        if is_hidden(parent) or not is_hidden(path):
            self.unsynced.add(parent)

    def _move(self, path: str, second: str, *, both: bool) -> None:
        here, there = _below(path, self.unsynced), _below(second, self.unsynced)
        if not is_hidden(second):
            self.early += sorted(here)
        self.unsynced -= here | there
        self.unsynced |= {second + name.removeprefix(path) for name in here}
        if both:
            self.unsynced |= {path + name.removeprefix(second) for name in there}
        moved = _below(path, self.known)
        self.known |= {second + name.removeprefix(path) for name in moved}
        if not both:
            self.known -= moved
        self._note_name(second)


def _below(path: str, names: set[str]) -> set[str]:
    return {name for name in names if name == path or name.startswith(f"{path}/")}


def played(result: Swept) -> Disk:
    """The disk after a run that nothing struck."""
    disk = Disk(set(result.known))
    for call in result.calls:
        if call.succeeded:
            disk.apply(call, _relative(call.path, result), _relative(call.second, result))
    disk.unsynced = {path for path in disk.unsynced if not is_hidden(path) and not is_log(path)}
    return disk


def _relative(path: str, result: Swept) -> str:
    return str(PurePosixPath(path).relative_to(result.work)) if path else ""


def renames_into(result: Swept, unit: str) -> Sequence[int]:
    """Where in the calls something is put under a final name."""
    moves = {"rename", "exchange", "link"}
    return [n for n, c in enumerate(result.calls) if c.kind in moves and c.succeeded and _relative(c.second, result) == unit]
