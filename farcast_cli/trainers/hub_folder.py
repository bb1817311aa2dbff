"""A folder of weights as the Hugging Face hub holds them: `step1000/` with a model or an adapter, no trainer.

A loop of one's own that saves its model so, with optimizer.pt or the like beside it, has its state moved on as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.trainers.base import ADAPTER_FILES, Layout, Snapshot, find_weights
from farcast_cli.trainers.by_content import lone_file
from farcast_cli.trainers.names import find_step_in_name
from farcast_cli.trainers.side_files import adam_steps, beside, counted_steps, named_steps, side_parts
from farcast_cli.trainers.weights_folder import WeightFile, find_adapters, find_shards, read_weights

if TYPE_CHECKING:
    from pathlib import Path


def _recognises(path: Path) -> bool:
    return path.is_dir() and bool(_sources(path))


def _sources(path: Path) -> list[WeightFile]:
    """A whole model, or adapters; a folder of adapter folders is one snapshot only where its name bears a step.

    The same holds for the one safetensors file of a folder under a name of the user's own.
    """
    whole = find_weights(path) or find_shards(path)
    if whole:
        return [WeightFile(whole)]
    adapters = find_adapters(path) if find_weights(path, ADAPTER_FILES) or find_step_in_name(path.name) else []
    alone = None if adapters else lone_file(path, "safetensors")
    return [WeightFile(alone)] if alone else adapters


def _read(path: Path) -> Snapshot:
    weights = read_weights(path, _sources(path))
    others, notes = side_parts(path, weights.parts)
    name = named_steps(path)
    return Snapshot(
        path,
        LAYOUT.name,
        (*weights.parts, *others),
        weights.tensors,
        (*counted_steps(others, name), *name, *adam_steps(others)),
        not_streamable=weights.rough,
        beside=tuple(beside(others)),
        notes=notes,
    )


LAYOUT = Layout("weights-folder", _recognises, _read)
