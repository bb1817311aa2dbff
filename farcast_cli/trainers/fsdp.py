"""What accelerate saves of models and optimisers under FSDP, by itself and inside a Hugging Face Trainer.

Sharded, each is a distributed checkpoint in a folder of its own: `pytorch_model_fsdp_0/`, `optimizer_0/`. Whole, each is one
torch file: `pytorch_model_fsdp.bin`, `optimizer.bin`. A Trainer saves whole weights once more, in model.safetensors.

Source: accelerate/utils/fsdp_utils.py; transformers/trainer.py, `_load_from_checkpoint`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.formats.dcp_file import read_dcp
from farcast_cli.trainers.dcp_parts import parts_of, weights_in_dcp
from farcast_cli.trainers.weights_folder import WeightFile, Weights, as_one, read_weights

if TYPE_CHECKING:
    from pathlib import Path

_MODEL = re.compile(r"pytorch_model_fsdp(?:_(\d+)|(?:_(\d+))?\.bin)")
_OPTIMIZER = re.compile(r"optimizer_\d+")


def has_fsdp(path: Path) -> bool:
    """Whether a folder has a model's weights as they are saved under FSDP, in shards that can be read or whole."""
    return bool(_models(path))


def _models(path: Path) -> list[Path]:
    """The weights of every model, the first one first; in shards where both forms are there."""
    found: dict[int, Path] = {}
    for entry in sorted(path.glob("pytorch_model_fsdp*")):
        name = _MODEL.fullmatch(entry.name)
        if name and entry.is_dir() != entry.name.endswith(".bin"):
            found.setdefault(int(name[1] or name[2] or 0), entry)
    return [entry for _, entry in sorted(found.items())]


def read_fsdp(path: Path) -> Weights:
    """The weights of all models, and the optimisers that are distributed checkpoints."""
    models = _models(path)
    weights = as_one(path, (_read_one(entry, path, f"model_{n}." if n else "") for n, entry in enumerate(models)))
    optimizers = [entry for entry in sorted(path.glob("optimizer_*")) if entry.is_dir() and _OPTIMIZER.fullmatch(entry.name)]
    parts = (part for folder in optimizers for part in parts_of(read_dcp(folder), path, "optimizer"))
    return replace(weights, parts=(*weights.parts, *parts))


def _read_one(entry: Path, path: Path, prefix: str) -> Weights:
    if entry.is_dir():
        return weights_in_dcp(read_dcp(entry), path, prefix)[0]
    return read_weights(path, [WeightFile(entry, prefix)])
