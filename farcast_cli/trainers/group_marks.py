"""The mark of a leap in an optimiser's first parameter group, which torch carries on.

`torch.optim.Optimizer.load_state_dict` keeps the keys of a saved group that it does not know, and `state_dict` saves them
again. So the mark is in every later checkpoint of a run that loads its optimiser: Lightning does, and a loop of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.tree import walk
from farcast_cli.trainers.base import marks_of

if TYPE_CHECKING:
    from farcast_cli.trainers.base import LeapMark, Snapshot

_KEY = "farcast_leaps"


def mark_group(tree: Any, mark: LeapMark) -> None:
    """Add a leap to the first group of the first optimiser in a tree, in place."""
    group = _first_group(tree)
    if group is not None:
        before = group.get(_KEY)
        leaps = before if isinstance(before, list) else []
        group[_KEY] = [*leaps, [mark.step, mark.origin_step, mark.valid_step]]


def marks_in_group(snapshot: Snapshot) -> list[LeapMark]:
    """The leaps that the first group of a snapshot's optimiser tells of."""
    content = snapshot.parts[0].content
    return marks_in_tree(content.tree) if isinstance(content, TorchFile) else []


def marks_in_tree(tree: Any) -> list[LeapMark]:
    """The leaps that the first group of the first optimiser in a tree tells of."""
    group = _first_group(tree)
    told = group.get(_KEY) if group else None
    return marks_of(row for row in (told if isinstance(told, list) else []) if isinstance(row, (list, tuple)))


def _first_group(tree: Any) -> dict[str, Any] | None:
    for _, node in walk(tree):
        groups = node.get("param_groups") if isinstance(node, dict) and "state" in node else None
        if isinstance(groups, list) and groups and isinstance(groups[0], dict):
            return groups[0]
    return None
