"""The step at which a run ends, where its checkpoint says so: in a trainer's state, or among the run's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import Made
from farcast_cli.layouts.lightning_loops import steps_to_end

if TYPE_CHECKING:
    from collections.abc import Iterator

    from farcast_cli.layouts.base import Snapshot

LAST_STEP_KEYS = ("max_steps", "max_iters", "total_steps", "num_training_steps", "max_train_steps")
EPOCHS_KEY = "max_epochs"
"""Lightning's own limit, for runs whose epochs the checkpoint tells."""
SETTINGS_KEYS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams", "args", "config", "cfg", "train_config")
"""Where a payload keeps its settings: Lightning's first, then what hand-written loops call them."""
_MAX_DEPTH = 4


def find_run_end(origin: Snapshot) -> tuple[str, int] | None:
    """Where the end of the run is said, as in `trainer_state.json says max_steps`, and the step.

    Among settings a number counts only if it is larger than the origin's step: a smaller one is of something else.
    """
    for part in origin.parts:
        if part.role == "trainer-state" and isinstance(part.content, dict):
            total = part.content.get("max_steps")
            if isinstance(total, int) and total > 0:
                return f"{part.path} says max_steps", total
        if part.role == "state" and isinstance(part.content, TorchFile) and isinstance(part.content.tree, dict):
            ends = [end for end in _ends(part.content.tree, origin.step) if end[1] > origin.step]
            if ends:
                where, total = min(ends, key=lambda end: end[1])
                return f"{part.path} says {where}", total
    return None


def _ends(tree: dict[Any, Any], step: int) -> Iterator[tuple[str, int]]:
    """Steps at which the settings say that the run ends, epochs turned into steps."""
    for key in SETTINGS_KEYS:
        for where, value in _settings_below(tree.get(key), key, _MAX_DEPTH):
            if not where.endswith(f".{EPOCHS_KEY}"):
                yield where, value
            elif (left := steps_to_end(tree, value)) is not None:
                yield f"{where} = {value}, in steps", step + left


def _settings_below(settings: Any, where: str, depth: int) -> Iterator[tuple[str, int]]:
    if not depth:
        return
    if isinstance(settings, Made):  # an argparse.Namespace or its like, whose state holds the settings
        for state in settings.states:
            yield from _settings_below(state, where, depth - 1)
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key in {*LAST_STEP_KEYS, EPOCHS_KEY} and isinstance(value, int) and not isinstance(value, bool):
            yield f"{where}.{key}", value
        yield from _settings_below(value, f"{where}.{key}", depth - 1)
