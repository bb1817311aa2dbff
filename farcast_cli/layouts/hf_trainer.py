"""A Hugging Face Trainer's `checkpoint-500/`: weights, optimizer.pt, scheduler.pt, trainer_state.json, the rest.

Source: transformers/trainer.py, `_save_checkpoint` and `_load_optimizer_and_scheduler`.
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
from farcast_cli.layouts.weights_folder import read_json, read_weights, second_weights

if TYPE_CHECKING:
    from pathlib import Path

STATE_FILE = "trainer_state.json"
_TORCH_ROLES: dict[str, Role] = {"optimizer.pt": "optimizer", "scheduler.pt": "scheduler"}


def _recognises(path: Path) -> bool:
    return (path / STATE_FILE).is_file() and find_weights(path) is not None


def _read(path: Path) -> Snapshot:
    _refuse_deepspeed(path)
    weights, tensors, rough = read_weights(path)
    known = {part.name for part in weights}
    state = read_json(path / STATE_FILE)
    others = [_part(file, name, state) for file, name in files_below(path) if name not in known]
    step = state.get("global_step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 10**MAX_DIGITS:
        raise FileFormatError(f"{path / STATE_FILE}: expected a global_step, found {str(step)[:40]}")
    evidence = (Evidence("trainer state", f"{STATE_FILE} global_step", step), *name_evidence(path))
    return Snapshot(
        path, LAYOUT.name, (*weights, *others), tensors, evidence, not_streamable=rough, beside=second_weights(others)
    )


def _refuse_deepspeed(path: Path) -> None:
    """With DeepSpeed the Trainer resumes from `global_stepN/`, whose partitions hold weights of their own."""
    if any(path.glob("global_step*/*_states.pt")):
        raise FileFormatError(
            f"{path}: a DeepSpeed checkpoint, which resumes from its own partitions: not read yet",
            hint=f"python {path}/zero_to_fp32.py {path} OUT makes weights that farcast reads, to be loaded without resuming",
        )


def _part(path: Path, name: str, state: dict[str, object]) -> Part:
    if name == STATE_FILE:
        return Part(path, name, "trainer-state", state)
    return Part(path, name, _TORCH_ROLES.get(name, "other"))


LAYOUT = Layout("huggingface-trainer", _recognises, _read)
