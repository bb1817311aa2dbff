"""The step at which a run ends, where the settings or the schedules in its checkpoint say so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import Made
from farcast_cli.formats.tree import dotted, walk
from farcast_cli.trainers.base import tree_of
from farcast_cli.trainers.schedules import ended_at, is_scheduler_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from farcast_cli.trainers.base import Snapshot

LAST_EPOCH_KEYS = ("max_epochs", "num_epochs", "num_train_epochs", "n_epochs", "epochs")
LAST_STEP_KEYS = ("max_steps", "max_iters", "total_steps", "num_training_steps", "max_train_steps")
SETTINGS_KEYS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams", "args", "config", "cfg", "train_config")
"""Where a payload keeps its settings: Lightning's first, then what hand-written loops call them."""
_SCHEDULE_ROLES = frozenset({"state", "side-state", "scheduler"})
_MAX_DEPTH = 4
_STATE = object()  # no key, and in no name


def end_of(
    origin: Snapshot, *, epochs_key: str = "", steps_left: Callable[[Any, int], int | None] | None = None
) -> tuple[str, int] | None:
    """Where the settings say that the run ends, as in `step_900.pt says args.max_steps`, and the step.

    The origin's own step where its schedules have ended.

    A number counts only if it is the origin's step or larger: a smaller one is of something else. Of epochs, only a larger one.

    Args:
        epochs_key: a setting that counts epochs.
        steps_left: from a tree to the end of so many epochs; None where the tree does not tell.
    """
    keys = LAST_EPOCH_KEYS if origin.unit == "epoch" else (*LAST_STEP_KEYS, *([epochs_key] if epochs_key else []))
    ended = end_by_schedules(origin)
    if ended:
        return ended
    for part in origin.parts:
        if part.role == "state" and isinstance(part.content, TorchFile) and isinstance(part.content.tree, dict):
            tree, ends = part.content.tree, []
            for where, value in _settings(tree, keys):
                if not (epochs_key and where.endswith(f".{epochs_key}")):
                    ends.append((where, value))
                elif steps_left and (left := steps_left(tree, value)):
                    ends.append((f"{where} = {value}, in steps", origin.step + left))
            later = [end for end in ends if end[1] >= origin.step]
            if later:
                where, total = min(later, key=lambda end: end[1])
                return f"{part.path} says {where}", total
    return None


def end_by_schedules(origin: Snapshot) -> tuple[str, int] | None:
    """The origin's own step, and what says so, if every schedule of torch's own in the checkpoint has ended; else None."""
    found = []
    for part in origin.parts:
        if part.role in _SCHEDULE_ROLES:
            nodes = walk(tree_of(part), enters=lambda _, node: not is_scheduler_state(node))
            found += [(part.path, _ended(node)) for _, node in nodes if is_scheduler_state(node)]
    ends = [(path, end) for path, end in found if end]
    if not found or len(ends) < len(found):
        return None
    path, (key, value) = ends[0]
    return f"{path} says {key}" + ("" if value == origin.step else f" = {value}, in steps"), origin.step


def _ended(state: Any) -> tuple[str, int] | None:
    try:
        return ended_at(state)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None  # damaged: said where it is advanced


def _settings(tree: dict[Any, Any], keys: Sequence[str]) -> Iterator[tuple[str, int]]:
    for key in SETTINGS_KEYS:
        for path, value in walk(tree.get(key), below=_settings_in, enters=lambda path, _: len(path) < _MAX_DEPTH):
            if path and path[-1] in keys and isinstance(value, int) and not isinstance(value, bool):
                yield dotted((key, *(name for name in path if name is not _STATE))), value


def _settings_in(node: object) -> Iterable[tuple[Any, Any]] | None:
    """What a dict holds, or the state of an argparse.Namespace or its like."""
    if isinstance(node, Made):
        return ((_STATE, state) for state in node.states)
    return node.items() if isinstance(node, dict) else None
