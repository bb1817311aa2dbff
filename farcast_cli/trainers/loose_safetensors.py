"""One safetensors file per snapshot: `step_1000.safetensors`, or one under another ending, such as `step_1000.ckpt`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from farcast_cli.formats.file_kind import kind_of
from farcast_cli.formats.safetensors_file import by_name, read_safetensors
from farcast_cli.trainers.base import Layout, Part, Snapshot, metadata_evidence, name_evidence
from farcast_cli.trainers.by_content import TORCH_ENDINGS, is_by_content

if TYPE_CHECKING:
    from pathlib import Path

_SHARD = re.compile(r"-\d+-of-\d+(?:\.\w+)?$")


def _recognises(path: Path) -> bool:
    if _SHARD.search(path.name):
        return False
    return path.is_file() if path.suffix == ".safetensors" else _is_under_other_ending(path)


def _is_under_other_ending(path: Path) -> bool:
    return (
        path.is_file() and kind_of(path) == "safetensors"
        if path.suffix in TORCH_ENDINGS
        else is_by_content(path, "safetensors")
    )


def _read(path: Path) -> Snapshot:
    file = read_safetensors(path)
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "weights", file),),
        by_name([file], path),
        (*name_evidence(path), *metadata_evidence(file.metadata)),
    )


LAYOUT = Layout("safetensors", _recognises, _read)
