"""A PyTorch Lightning checkpoint, `epoch=3-step=1000.ckpt`: weights, progress of the loops, optimizers, schedules.

A weight-averaging callback turns two keys round: `state_dict` then holds the average, for users to load, and the
weights that training goes on from are in `current_model_state`.

Source: lightning/pytorch/trainer/connectors/checkpoint_connector.py, `dump_checkpoint`; callbacks/weight_averaging.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, NoWeightsError, UnreadableError, UnsafeFileError
from farcast_cli.formats.torch_file import read_raw_pickle, read_torch_file
from farcast_cli.formats.torch_pickle import iter_tensors
from farcast_cli.layouts.base import MAX_DIGITS, Evidence, Layout, Part, Snapshot, name_evidence, weights_of
from farcast_cli.layouts.torch_payload import adam_evidence, other_weights, payload_evidence

if TYPE_CHECKING:
    from pathlib import Path

VERSION_KEY = "pytorch-lightning_version"
WEIGHTS, LIVE = ("state_dict",), ("current_model_state",)
_AVERAGED = "an average of the weights: stays as it is for resuming; --for evaluation puts the forecast in its place"
_RESUMED = {"loops", "optimizer_states", "lr_schedulers"}
_WEIGHTS_ONLY = "saved with the weights alone: trainer.fit(ckpt_path=...) cannot resume from it, only load its weights"
_LOOP = "epoch_loop."
_STEPS = (
    (f"{_LOOP}automatic_optimization.optim_progress", ("optimizer", "step", "total", "completed")),
    (f"{_LOOP}manual_optimization.optim_step_progress", ("total", "completed")),
)
"""Where the fit loop counts optimizer steps: one of the two stays at zero."""


def _recognises(path: Path) -> bool:
    """By its content: `.ckpt` is a common ending, and only Lightning writes its version into the file."""
    if path.suffix != ".ckpt" or not path.is_file():
        return False
    try:
        return VERSION_KEY.encode() in read_raw_pickle(path)
    except UnsafeFileError:
        return True  # to be refused where it is read
    except UnreadableError:
        raise
    except FileFormatError:
        return False  # not a torch file; whoever reads it says so


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
    beside = ((name, _AVERAGED if name == average else reason) for name, reason in other_weights(tree, key))
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "state", file, weights_key=key, mirror_key=WEIGHTS if averaged else ()),),
        tensors,
        (*_loop_evidence(tree), *payload_evidence(tree), *adam_evidence(file), *name_evidence(path)),
        not_streamable=rough,
        beside=tuple(beside),
        notes=() if tree.keys() >= _RESUMED else (_WEIGHTS_ONLY,),
    )


def _loop_evidence(tree: dict[str, Any]) -> tuple[Evidence, ...]:
    """What `trainer.global_step` will be after resuming: the optimizer steps that the loops have counted."""
    for name, keys in _STEPS:
        value: Any = tree.get("loops")
        for key in ("fit_loop", name, *keys):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int) and 0 < value < 10**MAX_DIGITS:
            return (Evidence("trainer state", f"loops {name.removeprefix(_LOOP)}", value),)
    return ()


LAYOUT = Layout("lightning", _recognises, _read, names_are_steps=False)
