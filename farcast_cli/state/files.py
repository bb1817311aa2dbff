"""A trainer's state files as trees: a file at several snapshots, and the optimisers' groups and schedules in it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.formats.pickle_file import PickleFile
from farcast_cli.formats.torch_file import TorchFile, as_number, read_torch_file
from farcast_cli.formats.torch_pickle import Made, TensorRef
from farcast_cli.formats.tree import children, find, walk, with_leaves
from farcast_cli.trainers.schedules import Observation, is_scheduler_state, with_rates

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.trainers.base import Role, Snapshot

STATE_ROLES: frozenset[Role] = frozenset({"state", "side-state", "optimizer", "scheduler", "trainer-state"})


@dataclass(frozen=True, slots=True)
class StateHistory:
    """One state file at the last few snapshots: (step, tree, file), the origin last."""

    states: tuple[tuple[int, Any, TorchFile | None], ...]

    def series(self, path: TreePath) -> list[tuple[int, int | float]]:
        """The values of a leaf by step, where it is a number."""
        found = []
        for step, tree, file in self.states:
            value = find(tree, path)
            if isinstance(value, TensorRef):
                value = as_number(file, value) if file else None
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.append((step, value))
        return found


def schedule_at(tree: object, path: TreePath, file: TorchFile | None) -> Any:
    """The state of a schedule as numbers; of one that saves its count alone, with the rates of its optimiser's groups."""
    state = as_numbers(find(tree, path), file)
    return with_rates(state, [as_numbers(groups, file) for groups in param_groups(tree)]) if isinstance(state, dict) else state


def observation(tree: object, path: TreePath, file: TorchFile | None) -> Observation | None:
    """The rates of a schedule at a snapshot, and how often it had been stepped."""
    state = schedule_at(tree, path, file)
    rates = state.get("_last_lr") if isinstance(state, dict) else None
    if not isinstance(rates, list) or "last_epoch" not in state:
        return None
    known = [float(rate) for rate in rates if isinstance(rate, (int, float))]
    return Observation(int(state["last_epoch"]), tuple(known)) if len(known) == len(rates) else None


def scheduler_paths(tree: object) -> Iterator[TreePath]:
    """Where the states of schedules are, the members of a chain not among them."""
    nodes = walk(tree, enters=lambda _, node: not is_scheduler_state(node))
    return (path for path, node in nodes if is_scheduler_state(node))


def _are_groups(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(group, dict) and "lr" in group for group in value)


def optimizer_states(tree: Any) -> Iterator[dict[str, Any]]:
    """The states of optimisers, in order."""
    nodes = walk(tree, enters=lambda _, node: not _is_optimizer(node))
    return (node for _, node in nodes if _is_optimizer(node))


def _is_optimizer(node: object) -> bool:
    return isinstance(node, dict) and _are_groups(node.get("param_groups")) and isinstance(node.get("state"), dict)


def param_groups(tree: object) -> Iterator[list[dict[str, Any]]]:
    """The parameter groups of every optimiser."""
    for state in optimizer_states(tree):
        yield state["param_groups"]


def as_numbers(tree: Any, file: TorchFile | None) -> Any:
    """A copy of a tree whose one-element tensors are numbers."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, TensorRef):
            return copy.deepcopy(leaf)
        found = as_number(file, leaf) if file else None
        return leaf if found is None else found

    return with_leaves(tree, plain)


def numbers_in(tree: object) -> list[int]:
    """The whole numbers of a tree, those of carried objects among them, in order."""

    def held(node: object) -> Iterable[tuple[Any, Any]] | None:
        return enumerate(node) if isinstance(node, (Made, tuple)) else children(node)

    return [node for _, node in walk(tree, below=held) if isinstance(node, int)]


def load_histories(snapshots: Sequence[Snapshot], roles: Collection[Role] = STATE_ROLES) -> dict[str, StateHistory]:
    """The state files of the last snapshots by part name in the last one, which has all of them; older ones may lack some.

    Kept snapshots have their numbers.
    """
    by_key: dict[str, list[tuple[int, Any, TorchFile | None]]] = {}
    for snapshot in snapshots:
        for part in snapshot.parts:
            if part.role in roles:
                file = read_torch_file(part.path) if part.content is None else part.torch_file
                content = file or part.content
                tree = content.tree if isinstance(content, (TorchFile, PickleFile)) else content
                by_key.setdefault(part.key, []).append((snapshot.step, tree, file))
        for state in snapshot.source.states if snapshot.source else ():
            by_key.setdefault(state.name, []).append((snapshot.step, state.tree, None))
    names = {part.key: part.name for part in snapshots[-1].parts}
    return {names.get(key, key): StateHistory(tuple(states)) for key, states in by_key.items()}
