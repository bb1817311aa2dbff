"""A folder of weights as the Hugging Face hub holds them: `step1000/` with model.safetensors or shards, no trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError
from farcast_cli.layouts.base import Layout, Part, Snapshot, files_below, find_weights, name_evidence
from farcast_cli.layouts.weights_folder import read_weights, second_weights

if TYPE_CHECKING:
    from pathlib import Path


def _recognises(path: Path) -> bool:
    return path.is_dir() and find_weights(path) is not None


def _read(path: Path) -> Snapshot:
    if any(path.glob("random_states_*.pkl")) or (path / "optimizer.bin").exists():
        raise FileFormatError(
            f"{path}: an accelerate save_state folder, whose optimiser and schedule are not moved on yet",
            hint="copy the weights alone into folders named by their step (step_1000/) for a forecast of the weights",
        )
    weights, tensors, rough = read_weights(path)
    known = {part.name for part in weights}
    others = [Part(file, name, "other") for file, name in files_below(path) if name not in known]
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights, *others),
        tensors,
        name_evidence(path),
        not_streamable=rough,
        beside=second_weights(others),
    )


LAYOUT = Layout("weights-folder", _recognises, _read)
