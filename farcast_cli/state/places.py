"""The place in the data, where a loader keeps it as an epoch and counts that start again with each epoch.

Such a count c rises by r a step, and an epoch has N of it: N (e - e0) + c is a line over the steps. All snapshots have to lie
on it, and r and N have to be whole in what the files say; else nothing is known.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import TYPE_CHECKING

from farcast_cli.formats.tree import find, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.state.files import StateHistory

    Series = Sequence[tuple[int, int]]

EPOCH_KEYS = ("epoch", "current_epoch")


def places_at(history: StateHistory, target: int) -> Iterator[tuple[TreePath, int, int]]:
    """Every count that starts again with an epoch beside it, and that epoch, at a later step: (where, old, new)."""
    for path, node in walk(history.states[-1][1]):
        keys = [key for key in EPOCH_KEYS if isinstance(node, dict) and _is_count(node.get(key))]
        if not keys:
            continue
        epochs = _series(history, (*path, keys[0]))
        found = {}
        for key, value in node.items():
            counts = _series(history, (*path, key)) if key != keys[0] and _is_count(value) else []
            place = place_at(epochs, counts, target) if _starts_again(counts) and len(counts) == len(epochs) else None
            if place is not None:
                found[key] = place
        if len({epoch for epoch, _ in found.values()}) == 1:
            yield from (((*path, key), node[key], count) for key, (_, count) in found.items())
            epoch = next(iter(found.values()))[0]
            yield (*path, keys[0]), node[keys[0]], epoch


def place_at(epochs: Series, counts: Series, target: int) -> tuple[int, int] | None:
    """The epoch, and the count within it, at a step; None where the snapshots do not tell.

    At an epoch's end the count is N, unless a snapshot has 0 in its place.

    >>> place_at([(10, 1), (20, 1), (30, 2)], [(10, 40), (20, 80), (30, 20)], 40)
    (2, 60)
    >>> place_at([(10, 1), (20, 1), (30, 2)], [(10, 40), (20, 80), (30, 20)], 50)
    (2, 100)
    """
    points = [(step, epoch, count) for (step, epoch), (_, count) in zip(epochs, counts, strict=True)]
    pairs = list(itertools.pairwise(points))
    rates = {Fraction(c1 - c0, s1 - s0) for (s0, e0, c0), (s1, e1, c1) in pairs if e0 == e1}
    if len(rates) != 1 or any(e1 < e0 for (_, e0, _), (_, e1, _) in pairs):
        return None
    rate = rates.pop()
    sizes = {(rate * (s1 - s0) - (c1 - c0)) / (e1 - e0) for (s0, e0, c0), (s1, e1, c1) in pairs if e0 != e1}
    size = sizes.pop() if len(sizes) == 1 else Fraction(0)
    if rate <= 0 or size <= 0 or size.denominator != 1 or not all(0 <= count <= size for _, _, count in points):
        return None
    step, epoch, count = points[-1]
    new = count + rate * (target - step)
    ended = new // size
    if new % size == 0 and not any(c == 0 for _, _, c in points):
        ended -= 1
    left = new - ended * size
    return (epoch + int(ended), int(left)) if left.denominator == 1 else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _series(history: StateHistory, path: TreePath) -> list[tuple[int, int]]:
    found = [(step, find(tree, path)) for step, tree, _ in history.states]
    return [(step, value) for step, value in found if _is_count(value)]


def _starts_again(counts: Series) -> bool:
    return any(after < before for (_, before), (_, after) in itertools.pairwise(counts))
