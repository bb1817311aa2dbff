"""Counters in the metadata of safetensors files at a later step. Metadata are texts: whole numbers, or JSON that holds them."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from farcast_cli.formats.safetensors_file import SafetensorsFile
from farcast_cli.formats.tree import at, dotted, find, put, walk
from farcast_cli.state.advance import HISTORY, Change, is_counter, moved
from farcast_cli.state.counters import MIN_TO_COUNT
from farcast_cli.trainers.base import KEPT_KEY, METADATA_STEPS, is_step, metadata_json
from farcast_cli.trainers.names import MAX_DIGITS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.trainers.base import Snapshot


def advance_metadata(snapshots: Sequence[Snapshot], horizon: int) -> tuple[dict[str, str], list[Change], list[str]]:
    """The texts that change, by key, what changed in them, and notes on counters that stay.

    Each counter moves by its own rate over the last snapshots. What does not rise steadily stays as the origin has it.
    """
    told = [(snapshot.step, _tree(snapshot)) for snapshot in snapshots[-HISTORY:]]
    tree, target = copy.deepcopy(told[-1][1]), snapshots[-1].step + horizon
    keys, changes, notes = set(), [], []
    for path, old in list(_counters(tree)):
        series = [(step, value) for step, earlier in told if is_step(value := find(earlier, path))]
        new = _moved(path, series, target)
        if new is not None and new > old:
            put(tree, path, new)
            keys.add(path[0])
            changes.append(Change(f"metadata {dotted(path)}", old, new))
        elif len({value for _, value in series}) > 1:
            notes.append(f"metadata {dotted(path)} stays at {old}: it does not rise steadily with the step")
    return {key: _text(tree[key]) for key in keys}, changes, notes


def _moved(path: TreePath, series: Sequence[tuple[int, int]], target: int) -> int | None:
    """Any two values lie on a line: they tell a counter only where its key does."""
    if len({value for _, value in series}) < min(len(series), 2) or (
        len(series) < MIN_TO_COUNT and path[-1] not in METADATA_STEPS
    ):
        return None
    key = "epoch" if str(path[-1]).endswith("epoch") else path[-1]
    new = moved((*path[:-1], key), series[-1][1], series, target)
    return None if new is None else int(new)


def _tree(snapshot: Snapshot) -> dict[str, Any]:
    """The metadata of a snapshot's first file of weights: whole numbers, and objects whose text JSON gives back unchanged."""
    file = next((part.content for part in snapshot.parts if isinstance(part.content, SafetensorsFile)), None)
    texts: Mapping[str, str] = file.metadata if file else {}
    values = {key: _value(text) for key, text in texts.items() if key != KEPT_KEY}
    return {key: value for key, value in values.items() if value is not None and _text(value) == texts[key]}


def _value(text: str) -> Any:
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else metadata_json(text)


def _text(value: Any) -> str:
    return json.dumps(value)


def _counters(tree: dict[str, Any]) -> Iterator[tuple[TreePath, int]]:
    for path, node in walk(tree):
        if path and is_step(node) and is_counter(path) and isinstance(at(tree, path[:-1]), dict):
            yield path, node
