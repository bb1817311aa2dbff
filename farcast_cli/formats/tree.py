"""Trees of dicts and lists, as checkpoint files hold them: walked, read and changed by the keys that lead to a place."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MAX_DEPTH = 64
MAX_NODES = 4_000_000

TreePath = tuple[Any, ...]
"""The keys and numbers that lead from a tree's root to a place in it."""


def children(node: object) -> Iterable[tuple[Any, Any]] | None:
    """The values of a dict by their keys, those of a list by their numbers; None for a leaf."""
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, list) else None


def walk(
    tree: Any,
    *,
    below: Callable[[Any], Iterable[tuple[Any, Any]] | None] = children,
    enters: Callable[[TreePath, Any], bool] | None = None,
    most: int = MAX_NODES,
) -> Iterator[tuple[TreePath, Any]]:
    """Every node of a tree with its path, the root first, each before what it holds. Wide trees take no memory.

    Args:
        below: what a node holds, by keys; None for a leaf.
        enters: whether the walk goes on below a node; by default always.

    Raises:
        UnsafeFileError: nested more than MAX_DEPTH deep, as a tree that holds itself is, or more than `most` nodes.

    >>> list(walk({"a": [1, 2]}))
    [((), {'a': [1, 2]}), (('a',), [1, 2]), (('a', 0), 1), (('a', 1), 2)]
    >>> [path for path, _ in walk({"a": [1, 2], "b": 3}, enters=lambda path, _: path != ("a",))]
    [(), ('a',), ('b',)]
    """
    yield (), tree
    levels: list[Iterator[tuple[Any, Any]]] = []
    path: list[Any] = []
    if (inner := below(tree)) is not None and (enters is None or enters((), tree)):
        levels.append(iter(inner))
    num_visits = 0
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            del path[-1:]
            continue
        key, node = found
        num_visits += 1
        if len(levels) > MAX_DEPTH or num_visits > most:
            raise UnsafeFileError(f"its objects are nested more than {MAX_DEPTH} deep, or more than {most}")
        here = (*path, key)
        yield here, node
        if (inner := below(node)) is not None and (enters is None or enters(here, node)):
            levels.append(iter(inner))
            path.append(key)


def at(tree: Any, path: TreePath) -> Any:
    """What lies at a path, which must lead somewhere.

    >>> at({"a": [1, {"b": 2}]}, ("a", 1, "b"))
    2
    """
    for key in path:
        tree = tree[key]
    return tree


def find(tree: Any, path: TreePath) -> Any:
    """What lies at a path; None where nothing does.

    >>> find({"a": [1, 2]}, ("a", 1)), find({"a": [1, 2]}, ("a", 2)), find({"a": [1, 2]}, ("b", "c"))
    (2, None, None)
    """
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree


def is_below(path: TreePath, places: Iterable[TreePath]) -> bool:
    """Whether a path leads to one of these places, or to what one of them holds.

    >>> is_below(("a", 0), [("a",)]), is_below(("a",), [("a",)]), is_below(("a",), [("a", 0)])
    (True, True, False)
    """
    return any(path[: len(place)] == place for place in places)


def put(tree: Any, path: TreePath, value: object) -> None:
    """Set what lies at a path; all but the last key must be there.

    >>> tree = {"a": [1, 2]}
    >>> put(tree, ("a", 1), 3)
    >>> tree
    {'a': [1, 3]}
    """
    at(tree, path[:-1])[path[-1]] = value


def grow(tree: Any, path: TreePath, value: object) -> None:
    """Set what lies at a path; a list for a number and a dict for any other key are made on the way.

    >>> tree = {}
    >>> grow(tree, ("groups", 1, "lr"), 0.1)
    >>> tree
    {'groups': [None, {'lr': 0.1}]}

    Source: torch/distributed/checkpoint/_traverse.py, set_element.
    """
    for key, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(tree, list):
            tree.extend([None] * (key + 1 - len(tree)))
        if following is None:
            tree[key] = value
        elif (tree[key] if isinstance(tree, list) else tree.get(key)) is None:
            tree[key] = [] if type(following) is int else {}
        tree = tree[key]


def with_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree with what a function makes of each leaf; an OrderedDict stays one.

    >>> with_leaves({"a": [1, 2], "b": 3}, lambda leaf: -leaf)
    {'a': [-1, -2], 'b': -3}
    """
    if isinstance(tree, dict):
        made = copy.copy(tree)
        for key, value in tree.items():
            made[key] = with_leaves(value, change)
        return made
    return [with_leaves(value, change) for value in tree] if isinstance(tree, list) else change(tree)


def dotted(path: TreePath) -> str:
    """A path as a name.

    >>> dotted(("optimizers", 0, "lr"))
    'optimizers.0.lr'
    """
    return ".".join(map(str, path))
