"""What lies beside the weights in a folder: state files to move on, everything else to copy, and what they say of the step.

A state file is a torch file, a JSON object or a plain pickle that loops of all kinds save beside the weights, in subfolders too:
optimizer.bin, scheduler.pt, train/rank0.pt, custom_checkpoint_0.pkl, progress.json. Random states, samplers, settings and
arguments are copied unread.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.files.reading import file_size
from farcast_cli.formats.pickle_file import is_pickle, read_pickle
from farcast_cli.formats.torch_file import TorchFile, is_torch_zip, read_torch_file
from farcast_cli.formats.torch_pickle import TensorRef
from farcast_cli.trainers.base import Evidence, Part, Role, name_evidence, outside, tree_of
from farcast_cli.trainers.folder_files import files_below
from farcast_cli.trainers.names import find_step_in_name
from farcast_cli.trainers.networks import WEIGHT_KEYS, num_weights
from farcast_cli.trainers.torch_payload import adam_evidence, payload_evidence
from farcast_cli.trainers.weights_folder import parse_json_of, second_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_STATE = re.compile(r".*\.(?:pth?|json|bin|ckpt|tar|pkl|pickle)", re.IGNORECASE)
_SURE = re.compile(r".*\.(?:pth?|json)|(?:optim|sched|lr_sched|scaler).*\.bin|custom_checkpoint_\d+\.pkl", re.IGNORECASE)
"""Names of files that are what their ending says; others are looked at first."""
_PICKLE = re.compile(r"\.(?:pkl|pickle)$", re.IGNORECASE)
_LEFT_ALONE = re.compile(r"rng|random|sampler|dl_state|dataloader|args|tokenizer|model|weights|consolidated", re.IGNORECASE)
"""Names of what is not moved on: random states, the place in the data, arguments, and second files of weights."""
_SETTINGS = re.compile(r"config|index|vocab|special_tokens|processor|added_tokens|chat_template", re.IGNORECASE)
"""Names of JSON files that describe the model or its weights."""
_MAX_JSON_BYTES = 1 << 20
_LOADERS = re.compile(r"dl_state|dataloader")
_SKIPPED = 0.9  # of the steps in the name Adam must have counted, for those that it missed to count as skipped


def side_parts(folder: Path, known: Iterable[Part]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Every file of a snapshot's folder that is no part yet, and what cannot be moved on, in words."""
    names = {part.name for part in known}
    parts, notes = [], []
    for path, name in files_below(folder):
        if name not in names:
            part, note = _read_side(path, name)
            parts.append(part)
            notes += [note] if note else []
    return tuple(parts), tuple(notes)


def _read_side(path: Path, name: str) -> tuple[Part, str]:
    role = _role_of(name)
    if role == "other":
        stays = f"{name} is copied: a resumed loop gets the batches that followed the origin" if _LOADERS.search(name) else ""
        return Part(path, name, role), stays
    try:
        part = _read_by_kind(path, name, role)
    except FileFormatError as error:
        if role != "side-state" and not isinstance(error, UnsafeFileError):
            raise  # an optimiser's or a schedule's file that is damaged
        return Part(path, name, "other"), f"{name} is copied with the origin's counters: {error}"
    if role == "side-state" and isinstance(part.content, TorchFile) and _holds_weights(part.content):
        return Part(path, name, "other"), f"{name} is copied: it contains other weights, which stay at the origin"
    return part, ""


def _read_by_kind(path: Path, name: str, role: Role) -> Part:
    """A state file as what it is; as any other file where its name does not say and its content is none of these."""
    if name.endswith(".json"):
        return _read_json(path, name)
    if not is_torch_zip(path):
        if _PICKLE.search(name) and is_pickle(path):
            return Part(path, name, role, read_pickle(path))
        if not _SURE.fullmatch(PurePosixPath(name).name):
            return Part(path, name, "other")
    return Part(path, name, role, read_torch_file(path))


def _read_json(path: Path, name: str) -> Part:
    """A JSON object as a state file; a list, and what is too large to be one, as any other file."""
    if file_size(path) > _MAX_JSON_BYTES:
        return Part(path, name, "other")
    tree = parse_json_of(path)
    return Part(path, name, "side-state", tree) if isinstance(tree, dict) else Part(path, name, "other")


def _role_of(name: str) -> Role:
    if (
        not _STATE.fullmatch(name)
        or _LEFT_ALONE.search(PurePosixPath(name).name)
        or (name.endswith(".json") and _SETTINGS.search(name))
    ):
        return "other"
    if name.endswith(".json"):
        return "side-state"
    if "sched" in name.lower():
        return "scheduler"
    return "optimizer" if PurePosixPath(name).name.lower().startswith("optim") else "side-state"


def _holds_weights(file: TorchFile) -> bool:
    """Whether a file beside the weights has some of its own: under a usual key, or bare."""
    tree = file.tree if isinstance(file.tree, dict) else {}
    usual = next((tree[key] for key in WEIGHT_KEYS if isinstance(tree.get(key), dict) and num_weights(tree[key])), None)
    is_bare = any(isinstance(value, TensorRef) for value in tree.values())
    return usual is not None or (is_bare and num_weights(tree) > 0)


def beside(parts: Iterable[Part]) -> Iterator[tuple[str, str]]:
    """Weights that are copied: second files of weights, and averages that state files hold."""
    listed = list(parts)
    yield from second_weights(listed)
    for part in listed:
        if part.role == "side-state" and isinstance(part.content, TorchFile):
            count = num_weights(part.content.tree)
            if count:
                yield part.name, outside(count)


# --- the step --------------------------------------------------------------------------------------------------------


def counted_steps(parts: Iterable[Part], name: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
    """The step by the counter of a loop's own state file, unless the folder's name has another: it may count anything."""
    states = ((part.content, tree_of(part)) for part in parts if part.role == "side-state")
    found = _first(
        payload_evidence(tree, file if isinstance(file, TorchFile) else None) for file, tree in states if isinstance(tree, dict)
    )
    return found if not name or (found and found[0].step == name[0].step) else ()


def adam_steps(parts: Iterable[Part]) -> tuple[Evidence, ...]:
    """The step as the first optimiser's file, or distributed checkpoint, has counted it."""
    files = (part.torch_file for part in parts if part.role == "optimizer")
    return _first(adam_evidence(file) for file in files if file is not None)


def scheduled_steps(parts: Iterable[Part]) -> tuple[Evidence, ...]:
    """How often a schedule was stepped: once a step, once for each process, or once an epoch."""
    for part, tree in ((part, tree_of(part)) for part in parts if part.role == "scheduler"):
        count = tree.get("last_epoch") if isinstance(tree, dict) else None
        if isinstance(count, int) and count >= 0:
            return (Evidence("scheduler", f"{part.name} last_epoch", count),)
    return ()


def named_steps(path: Path, *, glued: bool = False) -> tuple[Evidence, ...]:
    """The step by the folder's name; with `glued`, only where the name says that it is one (`step_500`)."""
    found = find_step_in_name(path.name)
    says = found and re.search(r"step|iter|update", found[0], re.IGNORECASE)
    return name_evidence(path) if says or not glued else ()


def by_trust(adam: tuple[Evidence, ...], name: tuple[Evidence, ...]) -> tuple[Evidence, ...]:
    """Adam's count before the name, unless it merely falls a little short, as where a loss scaler skipped steps."""
    skipped = adam and name and _SKIPPED * name[0].step <= adam[0].step < name[0].step
    return (*name, *adam) if skipped else (*adam, *name)


def _first(found: Iterable[tuple[Evidence, ...]]) -> tuple[Evidence, ...]:
    return next((item for item in found if item), ())
