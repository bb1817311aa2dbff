"""What a loop pickled by itself into its state, such as a data loader's place: moved on where it consists of counts.

A loader that is moved on in part would be at no place at all. So either all that changed from snapshot to snapshot is a count
that rises steadily with the step, or the bytes stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FarcastError
from farcast_cli.formats.torch_pickle import decode_pickle, encode_pickle
from farcast_cli.formats.tree import find, put, walk
from farcast_cli.state.counters import MIN_TO_COUNT, extrapolate, is_steady

if TYPE_CHECKING:
    from collections.abc import Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.state.files import StateHistory


@dataclass(frozen=True, slots=True)
class Pickled:
    """Pickled counts at a later step: the new pickle, and what changed in it: (where, old, new)."""

    raw: bytes
    changes: tuple[tuple[TreePath, int, int], ...]


def pickled_at(history: StateHistory, path: TreePath, target: int) -> Pickled | None:
    """The pickle at a path of a state file at a later step; None where it is none, or holds more than counts that changed.

    The pickle is read as plain data: nothing in it runs.
    """
    try:
        trees = [(step, decode_pickle(Path(str(path[-1])), raw)) for step, raw in _bytes_at(history, path)]
    except FarcastError:
        return None
    if len(trees) < MIN_TO_COUNT:
        return None
    places = [dict(walk(tree)) for _, tree in trees]
    if any(one.keys() != places[-1].keys() for one in places):
        return None
    moved = []
    for place, last in places[-1].items():
        values = [one[place] for one in places]
        if isinstance(last, (dict, list)) or all(value == last for value in values):
            continue
        new = _count_at([(step, value) for (step, _), value in zip(trees, values, strict=True)], target)
        if new is None or not place:
            return None
        moved.append((place, last, new))
    tree = trees[-1][1]
    for place, _, new in moved:
        put(tree, place, new)
    return Pickled(encode_pickle(tree), tuple(moved))


def _bytes_at(history: StateHistory, path: TreePath) -> list[tuple[int, bytes]]:
    found = [(step, find(tree, path)) for step, tree, _ in history.states]
    return [(step, raw) for step, raw in found if isinstance(raw, bytes)]


def _count_at(series: Sequence[tuple[int, Any]], target: int) -> int | None:
    if not all(isinstance(value, int) and not isinstance(value, bool) for _, value in series) or not is_steady(series):
        return None
    new = extrapolate(series, target)
    return new if isinstance(new, int) else None
