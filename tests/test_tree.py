"""Walks over trees end, whatever the tree."""

from __future__ import annotations

from typing import Any

import pytest

from farcast_cli.errors import UnsafeFileError
from farcast_cli.formats.tree import MAX_DEPTH, walk


def nested(depth: int) -> list[Any]:
    """Lists in lists, so many in all, the innermost with a number in it."""
    tree: list[Any] = [0]
    for _ in range(depth - 1):
        tree = [tree]
    return tree


def test_a_walk_goes_as_deep_as_files_may_be_and_no_deeper() -> None:
    assert sum(1 for _ in walk(nested(MAX_DEPTH))) == MAX_DEPTH + 1
    with pytest.raises(UnsafeFileError, match="nested more than 64 deep"):
        list(walk(nested(MAX_DEPTH + 1)))


def test_a_tree_that_holds_itself_is_refused() -> None:
    tree: dict[str, Any] = {}
    tree["self"] = [tree]
    with pytest.raises(UnsafeFileError, match="nested more than 64 deep"):
        list(walk(tree))


def test_a_node_that_is_held_very_often_is_refused_before_it_has_been_visited_so_often() -> None:
    tree: list[Any] = [0]
    for _ in range(40):
        tree = [tree, tree]
    with pytest.raises(UnsafeFileError, match="more than 1000"):
        list(walk(tree, most=1000))


def test_a_walk_does_not_go_below_a_node_that_it_is_not_to_enter() -> None:
    tree = {"weights": {"a": 1}, "state": {"b": 2}}
    assert [path for path, _ in walk(tree, enters=lambda path, _: path != ("weights",))] == [
        (),
        ("weights",),
        ("state",),
        ("state", "b"),
    ]
