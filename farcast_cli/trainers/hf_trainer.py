"""A Hugging Face Trainer's `checkpoint-500/`: weights or adapters, optimizer.pt, scheduler.pt, trainer_state.json, the rest.

Source: transformers/trainer.py, `_save_checkpoint`, `_load_from_checkpoint` and `_load_optimizer_and_scheduler`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError
from farcast_cli.files.json_text import UnreadList, parse_json, with_entry
from farcast_cli.files.reading import read_bytes
from farcast_cli.trainers import hub_folder
from farcast_cli.trainers.base import (
    Evidence,
    Layout,
    LeapMark,
    Part,
    Role,
    Snapshot,
    Trainer,
    find_weights,
    is_step,
    marks_of,
    name_evidence,
)
from farcast_cli.trainers.deepspeed import read_states, states_in
from farcast_cli.trainers.fsdp import has_fsdp, read_fsdp
from farcast_cli.trainers.refused import refuse
from farcast_cli.trainers.side_files import beside, side_parts
from farcast_cli.trainers.transformers_rates import named_formula
from farcast_cli.trainers.weights_folder import WeightFile, Weights, find_adapters, read_json, read_weights, with_twins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

STATE_FILE = "trainer_state.json"
_LOG = "log_history"
MARK = ("step", "farcast_leap_from", "farcast_leap_to")
MAX_LOG_BYTES = 1 << 24
_TORCH_ROLES: dict[str, Role] = {"optimizer.pt": "optimizer", "optimizer.bin": "optimizer", "scheduler.pt": "scheduler"}
_ONE_FILE = ("model.safetensors", "pytorch_model.bin")
_MISSING = (
    "{} is missing: a Trainer then skips optimizer.pt and scheduler.pt both, and starts the learning rate again at warm-up"
    " (save_only_model=False keeps them)"
)


def _recognises(path: Path) -> bool:
    return (path / STATE_FILE).is_file() and bool(has_fsdp(path) or states_in(path) or _sources(path))


def _sources(path: Path) -> list[WeightFile]:
    """What the Trainer loads on resuming: whole weights in one file, else adapters, else shards."""
    one = find_weights(path, _ONE_FILE)
    if one:
        return [WeightFile(one)]
    whole = find_weights(path)
    return find_adapters(path) or ([WeightFile(whole)] if whole else [])


def _read(path: Path) -> Snapshot:
    refuse(path)
    weights = _weights(path)
    state = read_json(path / STATE_FILE, log=_LOG)
    known = [*weights.parts, *_own_files(path, state)]
    others, notes = side_parts(path, known)
    has_optimizer = any(part.role == "optimizer" or part.is_shard for part in known)
    step = state.get("global_step")
    if not is_step(step):
        raise FileFormatError(f"{path / STATE_FILE}: expected a global_step, found {str(step)[:40]}")
    evidence = (Evidence("trainer state", f"{STATE_FILE} global_step", step), *name_evidence(path))
    missing = [] if has_optimizer else ["optimizer.pt"]
    missing += [] if any(part.role == "scheduler" for part in known) else ["scheduler.pt"]
    return Snapshot(
        path,
        LAYOUT.name,
        (*known, *others),
        weights.tensors,
        evidence,
        not_streamable=weights.rough,
        beside=tuple(beside(others)),
        notes=(*((_MISSING.format(" and ".join(missing)),) if missing else ()), *notes),
    )


def _weights(path: Path) -> Weights:
    """Under FSDP or DeepSpeed the Trainer loads what these saved; the whole weights beside it are for users."""
    sources = _sources(path)
    if not (has_fsdp(path) or states_in(path)):
        return read_weights(path, sources)
    loaded = read_fsdp(path) if has_fsdp(path) else read_states(path)
    return with_twins(loaded, read_weights(path, sources), path) if sources else loaded


def _own_files(path: Path, state: dict[str, object]) -> Iterator[Part]:
    """The files of the Trainer's own state."""
    yield Part(path / STATE_FILE, STATE_FILE, "trainer-state", state)
    for name, role in _TORCH_ROLES.items():
        if (path / name).is_file():
            yield Part(path / name, name, role)


# --- resuming --------------------------------------------------------------------------------------------------------


def _state(snapshot: Snapshot) -> Mapping[str, Any]:
    content = next((part.content for part in snapshot.parts if part.role == "trainer-state"), None)
    return content if isinstance(content, dict) else {}


def _num_steps(snapshot: Snapshot) -> int | None:
    total = _state(snapshot).get("max_steps")
    return total if isinstance(total, int) and total > 0 else None


def _end(snapshot: Snapshot) -> tuple[str, int] | None:
    total = _num_steps(snapshot)
    return None if total is None else (f"{snapshot.path / STATE_FILE} says max_steps", total)


def _formula(snapshot: Snapshot) -> Callable[[int], float] | None:
    return named_formula(snapshot.parts, _num_steps(snapshot))


def _logged(snapshot: Snapshot, *keys: str) -> list[dict[str, Any]]:
    """The entries of the log that have certain keys."""
    log = _state(snapshot).get(_LOG)
    if isinstance(log, UnreadList):
        log = parse_json(read_bytes(log.path, log.offset, log.num_bytes)) if log.num_bytes <= MAX_LOG_BYTES else None
    return [entry for entry in log or () if isinstance(entry, dict) and entry.keys() >= set(keys)]


def _logged_rates(snapshot: Snapshot) -> list[tuple[int, float]]:
    entries = _logged(snapshot, "step", "learning_rate")
    return sorted({int(entry["step"]): float(entry["learning_rate"]) for entry in entries}.items())


def _logged_losses(snapshot: Snapshot) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    training, evaluation = (
        [(entry["step"], float(entry[key])) for entry in _logged(snapshot, "step", key) if _is_loss(entry, key)]
        for key in ("loss", "eval_loss")
    )
    return training, evaluation


def _is_loss(entry: dict[str, Any], key: str) -> bool:
    return is_step(entry["step"]) and isinstance(entry[key], (int, float))


# The Trainer reads the log with its state and appends to it: so an entry is in all checkpoints of a run that resumed.


def _mark(tree: Any, mark: LeapMark) -> None:
    log = tree.get(_LOG) if isinstance(tree, dict) else None
    entry = dict(zip(MARK, (mark.step, mark.origin_step, mark.valid_step), strict=True))
    if isinstance(log, UnreadList):
        tree[_LOG] = with_entry(log, entry)
    elif isinstance(log, list):
        log.append(entry)


def marks_in(log: Iterable[Any]) -> list[LeapMark]:
    """The leaps that a Trainer's log has marks of."""
    entries = (entry for entry in log if isinstance(entry, dict) and entry.keys() >= set(MARK))
    return marks_of([entry[key] for key in MARK] for entry in entries)


def _marks(snapshot: Snapshot) -> list[LeapMark]:
    return marks_in(_logged(snapshot))


TRAINER = Trainer(
    end=_end,
    num_steps=_num_steps,
    formula=_formula,
    logged_rates=_logged_rates,
    logged_losses=_logged_losses,
    mark=_mark,
    marks=_marks,
    log_lags=(1, 0),  # of transformers 5, and of those before
    without_optimizer="a Hugging Face Trainer then also restarts the learning rate",
    half_written={hub_folder.LAYOUT.name: f"no {STATE_FILE}, which the others have"},
)
LAYOUT = Layout("huggingface-trainer", _recognises, _read, trainer=TRAINER)
