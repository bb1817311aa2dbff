"""One torch file per snapshot: a bare state dict, or weights beside optimizer, scheduler and step.

What a hand-written training loop saves, nanoGPT's among them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from farcast_cli.formats.torch_file import TorchFile, as_number, read_torch_file
from farcast_cli.formats.torch_pickle import TensorRef, iter_carried
from farcast_cli.formats.tree import at, dotted, find
from farcast_cli.trainers.base import Evidence, Layout, Part, Snapshot, Trainer, is_step, name_evidence, outside, weights_of
from farcast_cli.trainers.by_content import is_torch
from farcast_cli.trainers.group_marks import mark_group, marks_in_group
from farcast_cli.trainers.networks import find_networks, holds_optimizer, num_weights
from farcast_cli.trainers.run_end import end_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

STEP_KEYS = (
    "global_step",
    "step",
    "step_count",
    "iteration",
    "iter_num",
    "iter",
    "num_steps",
    "steps",
    "updates",
    "num_updates",
)
"""Keys that hold a step, the first that is there. litgpt's `iter_num` counts batches, and its `step_count` steps.

`updates` are those of an average, one a step (ultralytics).
"""


def _recognises(path: Path) -> bool:
    return is_torch(path)


def _read(path: Path, chosen: Sequence[str] = ()) -> Snapshot:
    file = read_torch_file(path)
    found = find_networks(path, file.tree, chosen)
    part = Part(path, "", "state", file, networks=found.networks, averages=found.averages)
    weights = part.weights_in(file.tree)
    tensors, rough = weights_of(file, weights)
    holders = () if found.is_bare else tuple(dict.fromkeys(((), found.holder)))
    counted = (payload_evidence(holder, file) for place in holders if isinstance(holder := at(file.tree, place), dict))
    evidence = (*next((one for one in counted if one), ()), *adam_evidence(file), *name_evidence(path))
    beside = (*found.told, *_opaque_weights(weights))
    return Snapshot(path, LAYOUT.name, (part,), tensors, evidence, not_streamable=rough, beside=beside)


def other_weights(tree: dict[Any, Any], weights: TreePath) -> Iterator[tuple[str, str]]:
    """State dicts beside the weights: a second network, or an average of the first."""
    for key, value in tree.items():
        if (key,) == weights or not isinstance(value, dict) or holds_optimizer(value):
            continue
        count = num_weights(value)
        if count:
            yield f"{key}.*", outside(count)


def _opaque_weights(weights: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Tensors among the weights that are no plain stretch of numbers: quantised, sparse, subclasses."""
    for keys, made in iter_carried(weights):
        if made.maker.name.startswith("_rebuild_"):
            yield dotted(keys), f"{made.maker.name.removeprefix('_rebuild_')} is not forecast"


def payload_evidence(tree: dict[Any, Any], file: TorchFile | None = None) -> tuple[Evidence, ...]:
    """The first counter of steps at the top of a payload, or in its `train_state`; one in a tensor takes its file."""
    for where, holder in (("", tree), ("train_state.", tree.get("train_state"))):
        for key in STEP_KEYS:
            value = find(holder, (key,))
            if isinstance(value, TensorRef) and value.dtype.name in {"int64", "int32"} and file is not None:
                value = as_number(file, value)
            if is_step(value):
                return (Evidence("payload", where + key, value),)
    return ()


def adam_evidence(file: TorchFile, tree: object = None) -> tuple[Evidence, ...]:
    """Adam counts its own steps, per parameter; the largest count is the run's.

    Args:
        tree: the part of the file's tree that holds optimisers, or is one; all of it by default.
    """
    tree = file.tree if tree is None else tree
    if not isinstance(tree, dict):
        return ()
    whole = {file.path.stem: tree} if "param_groups" in tree else tree
    items = ((key, one) for key, value in whole.items() for one in (value if isinstance(value, list) else [value]))
    for key, value in items:
        state = value.get("state") if isinstance(value, dict) and "param_groups" in value else None
        if isinstance(state, dict):
            counts = [as_number(file, entry["step"]) for entry in state.values() if isinstance(entry, dict) and "step" in entry]
            known = [count for count in counts if count is not None and math.isfinite(count)]
            if known:
                return (Evidence("adam step", f"{key}.state.*.step", int(max(known))),)
    return ()


TRAINER = Trainer(end=end_of, mark=mark_group, marks=marks_in_group)
LAYOUT = Layout("torch", _recognises, _read, names_are_steps=False, trainer=TRAINER, read_chosen=_read)
