"""A PyTorch Lightning checkpoint, `epoch=3-step=1000.ckpt`: weights, progress of the loops, optimizers, schedules.

A weight-averaging callback turns two keys round: `state_dict` then holds the average, for users to load, and the
weights that training goes on from are in `current_model_state`.

Source: lightning/pytorch/trainer/connectors/checkpoint_connector.py, `dump_checkpoint`; callbacks/weight_averaging.py.
"""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError, UnsafeFileError
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import iter_tensors
from farcast_cli.formats.tree import find
from farcast_cli.trainers.base import (
    AVERAGED,
    Average,
    Evidence,
    Layout,
    Network,
    Part,
    Snapshot,
    Trainer,
    holds_text,
    name_evidence,
    weights_of,
)
from farcast_cli.trainers.by_content import TORCH_ENDINGS, is_torch
from farcast_cli.trainers.group_marks import mark_group, marks_in_group
from farcast_cli.trainers.lightning_loops import VERSION_KEY, epoch_after, is_lightning, loops_clock, steps_to_end
from farcast_cli.trainers.names import MAX_DIGITS
from farcast_cli.trainers.networks import pairs_of
from farcast_cli.trainers.run_end import end_of
from farcast_cli.trainers.torch_payload import adam_evidence, other_weights, payload_evidence

if TYPE_CHECKING:
    from pathlib import Path

EPOCHS_KEY = "max_epochs"
WEIGHTS, LIVE = ("state_dict",), ("current_model_state",)
_RESUMED = {"loops", "optimizer_states", "lr_schedulers"}
_WEIGHTS_ONLY = "saved with the weights only: trainer.fit(ckpt_path=...) cannot resume from it"
_LOOP = "epoch_loop."
_STEPS = (
    (f"{_LOOP}automatic_optimization.optim_progress", ("optimizer", "step", "total", "completed")),
    (f"{_LOOP}manual_optimization.optim_step_progress", ("total", "completed")),
)
"""Where the fit loop counts optimizer steps: one of the two stays at zero."""


def _recognises(path: Path) -> bool:
    """By its content: `.ckpt` is a common ending, and only Lightning writes its version into the file."""
    if path.suffix in TORCH_ENDINGS - {".ckpt"} or not is_torch(path):
        return False
    try:
        return holds_text(path, VERSION_KEY)
    except UnsafeFileError:
        return True  # to be refused where it is read


def _read(path: Path) -> Snapshot:
    file = read_torch_file(path)
    tree = file.tree if isinstance(file.tree, dict) else {}
    averaged = any(True for _ in iter_tensors(tree.get(LIVE[0])))
    key = LIVE if averaged else WEIGHTS
    weights = tree.get(key[0])
    if not any(True for _ in iter_tensors(weights)):
        raise NoWeightsError(f"{path}: a Lightning checkpoint whose {key[0]!r} holds no tensors")
    tensors, rough = weights_of(file, weights)
    average = f"{WEIGHTS[0]}.*"
    averages = (Average(WEIGHTS, tuple(pairs_of(tree.get(WEIGHTS[0]), weights))),) if averaged else ()
    beside = ((name, AVERAGED if name == average else reason) for name, reason in other_weights(tree, key))
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "state", file, networks=(Network(key),), averages=averages),),
        tensors,
        (*_loop_evidence(tree), *payload_evidence(tree), *adam_evidence(file), *name_evidence(path)),
        not_streamable=rough,
        beside=tuple(beside),
        notes=() if tree.keys() >= _RESUMED else (_WEIGHTS_ONLY,),
    )


def _loop_evidence(tree: dict[str, Any]) -> tuple[Evidence, ...]:
    """What `trainer.global_step` will be after resuming: the optimizer steps that the loops have counted."""
    for name, keys in _STEPS:
        value = find(tree, ("loops", "fit_loop", name, *keys))
        if isinstance(value, int) and 0 < value < 10**MAX_DIGITS:
            return (Evidence("trainer state", f"loops {name.removeprefix(_LOOP)}", value),)
    return ()


def _rename(name: str, tree: object, horizon: int) -> str:
    """A name that tells an epoch beside the step with another epoch, as wide as before."""
    epoch = epoch_after(tree, horizon)
    return name if epoch is None else re.sub(r"\bepoch=(\d+)", lambda old: f"epoch={epoch:0{len(old[1])}}", name)


TRAINER = Trainer(
    wrote=is_lightning,
    clock=loops_clock,
    rename=_rename,
    end=partial(end_of, epochs_key=EPOCHS_KEY, steps_left=steps_to_end),
    needs_optimizer="Lightning cannot load a checkpoint without that key",
    mark=mark_group,
    marks=marks_in_group,
    has_own_files=True,
)
LAYOUT = Layout("lightning", _recognises, _read, names_are_steps=False, trainer=TRAINER)
