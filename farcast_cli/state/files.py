"""A trainer's state files as trees: a file at several snapshots, and the optimisers' groups and schedules in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.formats.dcp_file import DcpFile
from farcast_cli.formats.torch_file import TorchFile, number, read_torch_file
from farcast_cli.formats.torch_pickle import TensorRef
from farcast_cli.trainers.schedules import Observation, is_scheduler_state

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from farcast_cli.trainers.base import Role, Snapshot

    TreePath = tuple[Any, ...]

STATE_ROLES: frozenset[Role] = frozenset({"state", "side-state", "optimizer", "scheduler", "trainer-state"})


@dataclass(frozen=True, slots=True)
class StateHistory:
    """One state file at the last few snapshots: (step, tree, file), the origin last."""

    states: tuple[tuple[int, Any, TorchFile | None], ...]

    def series(self, path: TreePath) -> list[tuple[int, int | float]]:
        """The values of a leaf by step, where it is a number."""
        found = []
        for step, tree, file in self.states:
            value = leaf(tree, path)
            if isinstance(value, TensorRef):
                value = number(file, value) if file else None
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append((step, value))
        return found


def observation(tree: object, path: TreePath, file: TorchFile | None) -> Observation | None:
    """The rates of a schedule at a snapshot, and how often it had been stepped."""
    state = leaf(tree, path)
    rates = state.get("_last_lr") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(rates, list) or "last_epoch" not in state:
        return None
    numbers = [number(file, rate) if file else rate for rate in rates]
    known = [float(rate) for rate in numbers if isinstance(rate, (int, float))]
    return Observation(int(state["last_epoch"]), tuple(known)) if len(known) == len(rates) else None


def scheduler_paths(tree: object, path: TreePath = ()) -> Iterator[TreePath]:
    """Where the states of schedules are."""
    if is_scheduler_state(tree):
        yield path
    elif isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from scheduler_paths(value, (*path, key))


def _are_groups(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(group, dict) and "lr" in group for group in value)


def optimizer_states(tree: Any) -> Iterator[dict[str, Any]]:
    """The states of optimisers, in order."""
    if isinstance(tree, dict) and _are_groups(tree.get("param_groups")) and isinstance(tree.get("state"), dict):
        yield tree
    elif isinstance(tree, (dict, list)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from optimizer_states(value)


def param_groups(tree: object) -> Iterator[list[dict[str, Any]]]:
    """The parameter groups of every optimiser."""
    for state in optimizer_states(tree):
        yield state["param_groups"]


def as_numbers(tree: Any, file: TorchFile | None) -> Any:
    """A copy of a tree whose one-element tensors are numbers."""
    if isinstance(tree, TensorRef):
        found = number(file, tree) if file else None
        return tree if found is None else found
    if isinstance(tree, dict):
        made = copy.copy(tree)  # an OrderedDict or a Counter stays one
        for key, value in tree.items():
            made[key] = as_numbers(value, file)
        return made
    if isinstance(tree, list):
        return [as_numbers(value, file) for value in tree]
    return copy.deepcopy(tree)


def load_histories(snapshots: Sequence[Snapshot], roles: Collection[Role] = STATE_ROLES) -> dict[str, StateHistory]:
    """The state files of the last snapshots by part name; the origin has all of them, older ones may lack some."""
    by_name: dict[str, list[tuple[int, Any, TorchFile | None]]] = {}
    for snapshot in snapshots:
        for part in snapshot.parts:
            if part.role in roles:
                content = part.content if part.content is not None else read_torch_file(part.path)
                content = content.as_torch if isinstance(content, DcpFile) else content
                file = content if isinstance(content, TorchFile) else None
                by_name.setdefault(part.name, []).append((snapshot.step, file.tree if file else content, file))
    return {name: StateHistory(tuple(states)) for name, states in by_name.items()}


def leaf(tree: Any, path: TreePath) -> Any:
    """What lies at a path; None where nothing does."""
    for key in path:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, (list, tuple)) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree
