"""A kept snapshot: one safetensors file with the weights of a checkpoint, as `farcast keep` copied them.

Its metadata hold, as one JSON text, what farcast needs of the rest of the checkpoint: the step and where it was found, the
numbers of the trainer's state (counters, learning rates), the marks of leaps, the run's folder, and a fingerprint.

A JSON object stands for a dict whose keys are texts. Any other dict is `{"": [[key, value], ...]}`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farcast_cli import __version__
from farcast_cli.choices import StepUnit  # noqa: TC001 - pydantic reads the annotation
from farcast_cli.errors import FileFormatError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size, local, read_bytes
from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.formats.torch_file import TorchFile, as_number
from farcast_cli.formats.torch_pickle import TensorRef, in_collection
from farcast_cli.formats.tree import walk
from farcast_cli.tensors import DTYPES, is_dense
from farcast_cli.trainers.base import (
    KEPT_KEY,
    Evidence,
    KeptFrom,
    Layout,
    LeapMark,
    Part,
    Role,
    Snapshot,
    StateNumbers,
    Trainer,
)
from farcast_cli.trainers.names import MAX_DIGITS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from farcast_cli.formats.safetensors_file import SafetensorsFile
    from farcast_cli.formats.tree import TreePath
    from farcast_cli.tensors import TensorEntry

ENDING = ".kept.safetensors"
MAX_TEXT = 1_000  # characters of a text in a trainer's state
_MARK = f'{{"__metadata__":{{"{KEPT_KEY}":'.encode()
"""How the header of a kept snapshot begins."""
_HINT = "remove the file, and run farcast keep again"
_LEFT_OUT = object()

Count = Annotated[int, Field(ge=0, lt=10**MAX_DIGITS)]


class StateRecord(BaseModel):
    """The numbers of a state file; `tree` as `encoded` makes it."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    name: str
    role: Role
    is_read: bool
    tree: Any


class ViewRecord(BaseModel):
    """How a tensor's values lie in the file, where that is not row by row in a type of safetensors.

    With `sample`, only so many values lie there, as `sample_stretches` places them.
    """

    model_config = ConfigDict(defer_build=True, frozen=True)
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sample: int = 0


class KeptRecord(BaseModel):
    """What a kept snapshot says of the checkpoint that it was copied from. `run` is relative to the file's folder."""

    model_config = ConfigDict(defer_build=True, frozen=True)
    schema_version: Literal[1] = 1
    farcast_version: str = __version__
    name: str
    step: Count
    evidence: str
    layout: str
    run: str
    pattern: str
    weights: tuple[str, ...] = ()
    """The keys of the weights that were chosen; none where all networks were kept."""
    unit: StepUnit = "step"
    bytes: Count
    digest: str
    views: dict[str, ViewRecord]
    left_out: dict[str, int]
    """How many tensors were not copied, by the reason."""
    marks: tuple[tuple[Count, Count, Count], ...]
    states: tuple[StateRecord, ...]
    averages: dict[str, str] = {}
    """Marks of its averages, which are not copied."""

    @property
    def metadata(self) -> dict[str, str]:
        return {KEPT_KEY: json.dumps(self.model_dump(), separators=(",", ":"))}


# --- numbers of a state file -----------------------------------------------------------------------------------------


def encoded(tree: Any, file: TorchFile | None, without: Collection[TreePath] = ()) -> Any:
    """A state file's tree as JSON: numbers, short texts, and tensors of one element as numbers; other tensors are left out.

    Args:
        without: paths that are left out, such as that of the weights.

    Raises:
        UnsafeFileError: a tree that is nested too deep, as one that holds itself is, or too large.
    """
    for _ in walk(tree, below=in_collection):
        pass
    found = _encoded(tree, file, frozenset(without), ())
    return None if found is _LEFT_OUT else found


def _encoded(node: Any, file: TorchFile | None, without: frozenset[TreePath], path: TreePath) -> Any:
    if path in without:
        return _LEFT_OUT
    if isinstance(node, dict):
        pairs = [(key, _encoded(inner, file, without, (*path, key))) for key, inner in node.items() if _is_plain(key)]
        kept = [(key, inner) for key, inner in pairs if inner is not _LEFT_OUT]
        return dict(kept) if all(isinstance(key, str) and key for key, _ in kept) else {"": kept}
    if isinstance(node, (list, tuple)):
        items = [_encoded(inner, file, without, (*path, index)) for index, inner in enumerate(node)]
        return [None if item is _LEFT_OUT else item for item in items]
    if isinstance(node, TensorRef):
        number = as_number(file, node) if file else None
        return _LEFT_OUT if number is None else number
    return node if _is_plain(node) else None


def _is_plain(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, (bool, int, float)) or (isinstance(leaf, str) and len(leaf) <= MAX_TEXT)


def decoded(tree: Any) -> Any:
    """A state file's tree again.

    >>> decoded({"groups": [{"lr": 0.1}], "state": {"": [[0, {"step": 7.0}]]}})
    {'groups': [{'lr': 0.1}], 'state': {0: {'step': 7.0}}}
    """
    if isinstance(tree, list):
        return [decoded(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    pairs = tree[""] if tree.keys() == {""} else tree.items()
    return {key: decoded(item) for key, item in pairs}


# --- the layout ------------------------------------------------------------------------------------------------------


def _recognises(path: Path) -> bool:
    if not path.name.endswith(ENDING) or not path.is_file():
        return False
    try:
        head = read_bytes(path, 0, min(file_size(path), len(_MARK) + 8))
    except FileFormatError:
        return False  # gone, or not to be read; whoever reads it says so
    return head[8:] == _MARK


def _read(path: Path) -> Snapshot:
    file = read_safetensors(path)
    record = _record_of(file)
    file = replace(file, entries=tuple(_viewed(entry, record.views) for entry in file.entries))
    states = tuple(StateNumbers(one.name, one.role, _tree_of(path, one), one.is_read) for one in record.states)
    marks = tuple(LeapMark(*mark) for mark in record.marks)
    run = path.parent / local(record.run)
    source = KeptFrom(run, record.pattern, record.digest, record.bytes, states, marks, record.averages)
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "weights", file),),
        {entry.name: entry for entry in file.entries},
        (Evidence("metadata", record.evidence, record.step),),
        unit=record.unit,
        notes=_notes(record),
        source=source,
        weights=record.weights,
    )


def _record_of(file: SafetensorsFile) -> KeptRecord:
    try:
        record = KeptRecord.model_validate(parse_json(file.metadata[KEPT_KEY].encode()))
        if "\0" in local(record.run):
            raise ValueError(record.run)  # noqa: TRY301 - no path
    except (KeyError, ValueError) as error:  # pydantic's own error is a ValueError
        what = "of another version of farcast, or damaged" if isinstance(error, ValidationError) else "damaged"
        raise FileFormatError(f"{file.path}: a kept snapshot whose record is {what}", hint=_HINT) from error
    return record


def _tree_of(path: Path, state: StateRecord) -> Any:
    try:
        return decoded(state.tree)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: a kept snapshot whose {state.name or 'state'} is damaged", hint=_HINT) from error


def _viewed(entry: TensorEntry, views: Mapping[str, ViewRecord]) -> TensorEntry:
    """A tensor as its checkpoint had it."""
    view = views.get(entry.name)
    if view is None:
        return entry
    dtype = DTYPES.get(view.dtype)
    is_ordered = not view.strides or (len(view.strides) == len(view.shape) and is_dense(view.shape, view.strides))
    if dtype is not None and is_ordered and min(view.shape, default=0) >= 0 <= view.sample:
        found = replace(entry, dtype=dtype, shape=view.shape, strides=view.strides, sample=view.sample)
        if found.num_bytes == entry.num_bytes:
            return found
    raise FileFormatError(f"{entry.path}: a kept snapshot whose tensor {entry.name!r} does not fit its record", hint=_HINT)


def _notes(record: KeptRecord) -> tuple[str, ...]:
    told = [f"{count} ({reason})" for reason, count in record.left_out.items()]
    return (f"a kept snapshot has no trainer's state, and lacks tensors: {', '.join(told)}",) if told else ()


def _marks(snapshot: Snapshot) -> list[LeapMark]:
    return list(snapshot.source.marks) if snapshot.source else []


def _rename(name: str, _: object, __: int) -> str:
    """A forecast from kept snapshots alone is a plain safetensors file."""
    return name.replace(ENDING, ".safetensors")


LAYOUT = Layout("kept-snapshot", _recognises, _read, names_are_steps=False, trainer=Trainer(rename=_rename, marks=_marks))
