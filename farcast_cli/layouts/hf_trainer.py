"""A Hugging Face Trainer's `checkpoint-500/`: weights or adapters, optimizer.pt, scheduler.pt, trainer_state.json, the rest.

Source: transformers/trainer.py, `_save_checkpoint`, `_load_from_checkpoint` and `_load_optimizer_and_scheduler`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError
from farcast_cli.layouts.base import (
    MAX_DIGITS,
    Evidence,
    Layout,
    Part,
    Role,
    Snapshot,
    files_below,
    find_weights,
    name_evidence,
)
from farcast_cli.layouts.refused import refuse
from farcast_cli.layouts.weights_folder import Source, find_adapters, read_json, read_weights, second_weights

if TYPE_CHECKING:
    from pathlib import Path

STATE_FILE = "trainer_state.json"
_LOG = "log_history"
_TORCH_ROLES: dict[str, Role] = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler"}


_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_MISSING = (
    "{} is missing: a Trainer then skips optimizer.pt and scheduler.pt both, and starts the learning rate again at warm-up"
    " (save_only_model=False keeps them)"
)


def _recognises(path: Path) -> bool:
    return (path / STATE_FILE).is_file() and bool(_sources(path))


def _sources(path: Path) -> list[Source]:
    """What the Trainer loads on resuming: whole weights in one file, else adapters, else shards."""
    one = find_weights(path, _ONE_FILE)
    if one:
        return [Source(one)]
    whole = find_weights(path)
    return find_adapters(path) or ([Source(whole)] if whole else [])


def _read(path: Path) -> Snapshot:
    refuse(path)
    weights = read_weights(path, _sources(path))
    known = {part.name for part in weights.parts}
    state = read_json(path / STATE_FILE, log=_LOG)
    others = [_part(file, name, state) for file, name in files_below(path) if name not in known]
    step = state.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**MAX_DIGITS:
        raise FileFormatError(f"{path / STATE_FILE}: expected a global_step, found {str(step)[:40]}")
    evidence = (Evidence("trainer state", f"{STATE_FILE} global_step", step), *name_evidence(path))
    missing = [name for name in _TORCH_ROLES if not (path / name).is_file()]
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        evidence,
        not_streamable=weights.rough,
        beside=second_weights(others),
        notes=(_MISSING.format(" and ".join(missing)),) if missing else (),
    )


def _part(path: Path, name: str, state: dict[str, object]) -> Part:
    if name == STATE_FILE:
        return Part(path, name, "trainer-state", state)
    return Part(path, name, _TORCH_ROLES.get(name, "other"))


LAYOUT = Layout("huggingface-trainer", _recognises, _read)
