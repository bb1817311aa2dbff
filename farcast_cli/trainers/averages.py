"""Averages of the weights in a folder of their own: diffusers' scripts save `unet_ema/` beside `unet/`.

An average follows the weights and is no second model: it is not judged. Its weights are copied, and what its config.json
counts advances, because the average's decay depends on that.

Source: diffusers/training_utils.py, `EMAModel.save_pretrained` and `from_pretrained`, 0.42.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError
from farcast_cli.trainers.weights_folder import parse_json_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from farcast_cli.trainers.base import Part

_ENDING = "_ema"
_SETTINGS = "config.json"
_OWN_KEYS = {"decay", "optimization_step"}


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


def with_averages(folder: Path, parts: Iterable[Part]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """A snapshot's parts with the settings of its averages as files that count, and what a person should know of them."""
    averages = sorted(inner.name for inner in folder.iterdir() if inner.is_dir() and is_average(inner))
    counting = {f"{name}/{_SETTINGS}" for name in averages}
    found = (
        replace(part, role="side-state", content=_settings(part.path)) if part.name in counting else part for part in parts
    )
    notes = (
        f"{name}: an average of the weights: copied as the origin has it, its count of steps advances" for name in averages
    )
    return tuple(found), tuple(notes)
