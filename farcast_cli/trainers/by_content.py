"""Which files may be snapshots by themselves: by their first bytes, and by their endings where these do not tell.

A file under a usual ending is a torch file unless its first bytes are another format's: one that is empty or damaged is to be
told, not passed over. Under any other ending, or none, a file counts by its first bytes alone, and only with a number in its
name: a run's snapshots have one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from farcast_cli.formats.file_kind import kind_of
from farcast_cli.trainers.names import find_step_in_name, split_ending

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.formats.file_kind import FileKind

TORCH_ENDINGS = frozenset({".pt", ".pth", ".bin", ".ckpt"})
_ENDINGS = TORCH_ENDINGS | {".safetensors", ".zip"}
"""Of files that a layout is asked about whatever they are called."""
_WITH_TAR = frozenset({".pt.tar", ".pth.tar", ".ckpt.tar"})
"""Of torch files that are no tar, as the ImageNet example of torch calls them."""
_OTHER_ENDINGS = frozenset(
    {".safetensors", ".part", ".py", ".json", ".jsonl", ".yaml", ".yml", ".txt", ".log", ".csv", ".md"}
    | {".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4", ".wav", ".html", ".pdf"}
)
"""Of what is no torch file: there may be thousands of samples, and none is opened."""
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|random|args|sampler|loader|dl_state", re.IGNORECASE)
_BACKUP = re.compile(r"(?:\.(?:bak|backup|old|orig|sav|swp)[-_.]?\d*|~)$", re.IGNORECASE)
_MAY_BE_TORCH: frozenset[FileKind] = frozenset({"torch", "old torch", "pickle", "unknown", "zip", "msgpack"})
"""What a file under a torch ending may begin with; a pickle or a zip of another kind is refused where it is read."""


def may_be_snapshot(path: Path) -> bool:
    """Whether some layout may take a file for a snapshot: most files of other programs are no snapshot by their names alone."""
    by_ending = path.suffix in _ENDINGS or split_ending(path.name)[1] in _WITH_TAR
    return by_ending or is_by_content(path, "torch", "old torch", "safetensors", "stable-baselines3")


def is_torch(path: Path) -> bool:
    """Whether a file is one that `torch.save` wrote."""
    if path.suffix in TORCH_ENDINGS:
        return path.is_file() and kind_of(path) in _MAY_BE_TORCH
    if split_ending(path.name)[1] in _WITH_TAR:
        return path.is_file() and kind_of(path) in {"torch", "old torch"}
    return is_by_content(path, "torch", "old torch")


def lone_file(folder: Path, kind: FileKind) -> Path | None:
    """The one file of a kind in a snapshot's folder that may hold its weights, under a name of the user's own.

    The folder's name must bear the step and the file's none: else it is a run's folder. None where there are several.
    """
    if not find_step_in_name(folder.name):
        return None
    found = [path for path in sorted(folder.iterdir()) if _may_hold_weights(path) and kind_of(path) == kind]
    return found[0] if len(found) == 1 and not find_step_in_name(found[0].name) else None


def _may_hold_weights(path: Path) -> bool:
    return not path.name.startswith(".") and not _NO_WEIGHTS.search(path.name) and path.is_file()


def is_by_content(path: Path, *kinds: FileKind) -> bool:
    """Whether a file is of one of these kinds by its first bytes and may be a snapshot: no backup, and with a number in its name."""
    is_named = path.suffix not in _OTHER_ENDINGS and re.search(r"\d", path.name) and not _BACKUP.search(path.name)
    return bool(is_named) and path.is_file() and kind_of(path) in kinds
