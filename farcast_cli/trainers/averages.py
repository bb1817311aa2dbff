"""Averages of the weights in a folder of their own: diffusers' scripts save `unet_ema/` beside `unet/`.

An average follows the weights and is no second model: it is not judged. It moves with the weights, and what its config.json
counts advances, because the average's decay depends on that.

Source: diffusers/training_utils.py, `EMAModel.save_pretrained` and `from_pretrained`, 0.42.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError
from farcast_cli.trainers.base import AVERAGED, WEIGHT_FILES, find_weights
from farcast_cli.trainers.weights_folder import WeightFile, are_alike, parse_json_of, read_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Part
    from farcast_cli.trainers.weights_folder import Weights

_ENDING = "_ema"
_SETTINGS = "config.json"
_OWN_KEYS = {"decay", "optimization_step"}


@dataclass(frozen=True, slots=True)
class Averages:
    """The parts of a snapshot beside its weights, its averages among them, and what a person should know of these."""

    parts: tuple[Part, ...]
    beside: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def is_average(folder: Path) -> bool:
    """Whether a folder inside a snapshot holds an average of the weights beside it."""
    return folder.name.endswith(_ENDING) and bool(_OWN_KEYS & _settings(folder / _SETTINGS).keys())


def _settings(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        tree = parse_json_of(path)
    except FileFormatError:
        return {}
    return tree if isinstance(tree, dict) else {}


def with_averages(folder: Path, parts: Sequence[Part], weights: Weights) -> Averages:
    """The averages in a snapshot's folder: their settings as files that count, their weights as those that follow a model's.

    An average is that of the model whose folder has its name without the ending, or of the only model. One whose tensors are
    not that model's is copied with a note.

    Raises:
        FileFormatError: weights of an average that cannot be read.
    """
    found = {part.name: part for part in parts}
    beside, notes = [], []
    for inner in sorted(inner for inner in folder.iterdir() if inner.is_dir() and is_average(inner)):
        settings = f"{inner.name}/{_SETTINGS}"
        found[settings] = replace(found[settings], role="side-state", content=_settings(inner / _SETTINGS))
        own = _followers(folder, inner, weights)
        found |= {part.name: part for part in own}
        if own:
            beside.append((f"{inner.name}.*", AVERAGED))
        else:
            notes.append(f"{inner.name}: an average of no model in the folder: copied as the origin has it")
    return Averages(tuple(found.values()), tuple(beside), tuple(notes))


def _followers(folder: Path, inner: Path, weights: Weights) -> list[Part]:
    """The files of an average with the prefix of its model's names; none where its tensors are not that model's."""
    file = find_weights(inner, WEIGHT_FILES)
    prefixes = {part.prefix for part in weights.parts}
    prefix = f"{inner.name.removesuffix(_ENDING)}."
    if file is None or not (prefix in prefixes or len(prefixes) == 1):
        return []
    average = read_weights(folder, [WeightFile(file, prefix if prefix in prefixes else next(iter(prefixes)))])
    if not all(are_alike(weights.tensors.get(name), entry) for name, entry in average.tensors.items()):
        return []
    return [replace(part, role="average") if part.role == "weights" else part for part in average.parts]
