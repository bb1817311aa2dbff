"""One safetensors file per snapshot: `step_1000.safetensors`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.trainers.base import Layout, Part, Snapshot, metadata_evidence, name_evidence

if TYPE_CHECKING:
    from pathlib import Path

_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")


def _recognises(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.is_file() and not _SHARD.search(path.name)


def _read(path: Path) -> Snapshot:
    file = read_safetensors(path)
    tensors = {entry.name: entry for entry in file.entries}
    return Snapshot(
        path,
        LAYOUT.name,
        (Part(path, "", "weights", file),),
        tensors,
        (*name_evidence(path), *metadata_evidence(file.metadata)),
    )


LAYOUT = Layout("safetensors", _recognises, _read)
