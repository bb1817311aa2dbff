"""The answer for a folder in which there is no snapshot: what lies there, by kinds with their counts, and the way out."""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from farcast_cli.errors import TooFewSnapshotsError, listed
from farcast_cli.trainers.foreign import foreign_at

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from farcast_cli.trainers.foreign import Foreign

READ = (
    "farcast reads folders of Hugging Face Trainer, Lightning, Composer, accelerate, Fabric and torch.distributed.checkpoint, zip"
    " files of stable-baselines3, and safetensors and torch files under any name; farcast help formats has the list"
)
_EMPTY = "name the folder that the trainer saves to, or wait for its first checkpoint"
_MAX_KINDS = 3  # in a message
_MAX_LOOKED_AT = 2000  # entries; a run has fewer


def nothing_found(directory: Path, entries: Sequence[Path]) -> TooFewSnapshotsError:
    """That a folder has no snapshots, of which kinds its entries are, and what to do about the most frequent kind.

    Args:
        entries: all of the folder's but the hidden ones.
    """
    if not entries:
        what = "only hidden files" if any(directory.iterdir()) else "an empty folder"
        return TooFewSnapshotsError(f"{directory}: no snapshots found: {what}", hint=_EMPTY)
    below = [path for folder in entries if folder.is_dir() for path in _entries_of(folder)]
    for looked_at, where in ((entries, ""), (below, " in its folders")):
        kinds = {path: foreign_at(path) for path in looked_at[:_MAX_LOOKED_AT]}
        models = {path: kind for path, kind in kinds.items() if kind and kind.is_model}
        if models:
            return _only_foreign(directory, models, where)
    inside = f", in them {_by_ending(below)}" if below else ""
    return TooFewSnapshotsError(f"{directory}: no snapshots found, but {_by_ending(entries)}{inside}", hint=READ)


def _only_foreign(directory: Path, kinds: Mapping[Path, Foreign], where: str) -> TooFewSnapshotsError:
    by_kind: dict[str, list[Path]] = {}
    for path, kind in kinds.items():
        by_kind.setdefault(kind.what, []).append(path)
    ordered = sorted(by_kind.items(), key=lambda item: -len(item[1]))
    told = listed((f"{_by_ending(paths)} ({what})" for what, paths in ordered), most=_MAX_KINDS)
    hint = kinds[ordered[0][1][0]].hint
    return TooFewSnapshotsError(f"{directory}: no snapshots that farcast reads, but{where} {told}", hint=hint)


def _entries_of(folder: Path) -> list[Path]:
    """What a folder below holds; nothing where it may not be read."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(path for path in islice(folder.iterdir(), _MAX_LOOKED_AT) if not path.name.startswith("."))


def _by_ending(paths: Iterable[Path]) -> str:
    """How many there are of each ending.

    >>> from pathlib import Path
    >>> _by_ending(map(Path, ["a_1.tar.gz", "a_2.tar.gz", "b-3.data-00000-of-00001", "c_1"]))
    '2 .tar.gz files, 1 .data file, 1 file without an ending'
    """
    counts = Counter(map(_ending_of, paths))
    words = [f"{count} {ending} file" + "s" * (count != 1) for ending, count in counts.most_common() if ending.startswith(".")]
    for ending, one, several in (
        ("file", "file without an ending", "files without an ending"),
        ("folder", "folder", "folders"),
    ):
        words += [f"{counts[ending]} {one if counts[ending] == 1 else several}"] if counts[ending] else []
    return listed(words, most=_MAX_KINDS)


def _ending_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    found = re.search(r"((?:\.tar)?\.[a-z][a-z\d]{0,11})(?:-\d+-of-\d+)?$", path.name, re.IGNORECASE)
    return found[1].lower() if found else "file"
