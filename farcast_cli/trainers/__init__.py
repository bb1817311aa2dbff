"""Checkpoint layouts: which files make up one snapshot. One module per layout, tried in this order, folders apart from files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.files.reading import reading
from farcast_cli.trainers import (
    accelerate,
    composer,
    dcp,
    deepspeed,
    hf_trainer,
    hub_folder,
    kept,
    lightning,
    loose_safetensors,
    refused,
    stable_baselines3,
    torch_folder,
    torch_payload,
)
from farcast_cli.trainers.base import tree_of
from farcast_cli.trainers.by_content import may_be_snapshot

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.trainers.base import Layout, Snapshot, Trainer

FOLDER_LAYOUTS: tuple[Layout, ...] = (
    hf_trainer.LAYOUT,
    *refused.LAYOUTS,
    dcp.LAYOUT,
    accelerate.LAYOUT,
    deepspeed.LAYOUT,
    hub_folder.LAYOUT,
    torch_folder.LAYOUT,
)
FILE_LAYOUTS: tuple[Layout, ...] = (
    kept.LAYOUT,
    loose_safetensors.LAYOUT,
    lightning.LAYOUT,
    composer.LAYOUT,
    stable_baselines3.LAYOUT,
    torch_payload.LAYOUT,
)
LAYOUTS = FOLDER_LAYOUTS + FILE_LAYOUTS


def named(name: str) -> Layout:
    """The layout of a name."""
    return next(layout for layout in LAYOUTS if layout.name == name)


def trainer_of(snapshot: Snapshot) -> Trainer:
    """The trainer that wrote a snapshot: by its state, which may lie in a plain file too; else by its layout."""
    trees = [tree_of(part) for part in snapshot.parts if part.role in {"state", "side-state"}]
    by_state = (layout.trainer for layout in LAYOUTS if any(layout.trainer.wrote(tree) for tree in trees))
    return next(by_state, None) or named(snapshot.layout).trainer


def refuse_unread(path: Path) -> None:
    """Refuse a folder of a layout that is known and not read.

    Raises:
        FileFormatError: it is one; the hint names the tool that converts it.
    """
    refused.refuse(path)


def recognise(path: Path) -> Layout | None:
    """The layout of what lies at `path`, judged by names (a `.ckpt` or `.pt` by whose it is); None if it is no checkpoint.

    Raises:
        FileFormatError: the system cannot say what lies there.
    """
    with reading(path):
        layouts = FOLDER_LAYOUTS if path.is_dir() else FILE_LAYOUTS if may_be_snapshot(path) else ()
        return next((layout for layout in layouts if layout.recognises(path)), None)
