"""Checkpoint layouts: which files make up one snapshot. One module per layout, tried in the order of `LAYOUTS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.formats.files import reading
from farcast_cli.layouts import (
    accelerate,
    dcp,
    hf_trainer,
    hub_folder,
    lightning,
    loose_safetensors,
    refused,
    torch_folder,
    torch_payload,
)

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.layouts.base import Layout

LAYOUTS: tuple[Layout, ...] = (
    hf_trainer.LAYOUT,
    *refused.LAYOUTS,
    dcp.LAYOUT,
    accelerate.LAYOUT,
    hub_folder.LAYOUT,
    torch_folder.LAYOUT,
    loose_safetensors.LAYOUT,
    lightning.LAYOUT,
    torch_payload.LAYOUT,
)


def recognise(path: Path) -> Layout | None:
    """The layout of what lies at `path`, judged by names (a `.ckpt` by whose it is); None if it is no checkpoint.

    Raises:
        FileFormatError: the system cannot say what lies there.
    """
    with reading(path):
        return next((layout for layout in LAYOUTS if layout.recognises(path)), None)
