"""A distributed checkpoint of torch's as parts of a snapshot, whatever folder inside the snapshot it lies in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError
from farcast_cli.formats.dcp_file import METADATA, DcpFile, read_dcp
from farcast_cli.formats.tree import at, walk
from farcast_cli.trainers.base import Part, weights_of
from farcast_cli.trainers.names import find_step_in_name
from farcast_cli.trainers.torch_payload import WEIGHT_KEYS
from farcast_cli.trainers.weights_folder import Weights

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.trainers.base import Role

ENDING = ".distcp"
_DEPTH = 3  # levels below which weights are looked for, as in app.model


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint, or was to be one."""
    return folder.is_dir() and ((folder / METADATA).is_file() or any(folder.glob(f"*{ENDING}")))


def inner_checkpoints(path: Path) -> list[Path]:
    """The distributed checkpoints in folders of a snapshot's folder: `model/`, `optim/`, `optimizer_0/`."""
    return [folder for folder in sorted(path.iterdir()) if is_dcp(folder) and not is_snapshot_name(folder.name)]


def is_snapshot_name(name: str) -> bool:
    """Whether a folder's name says that it is a snapshot by itself, and no part of one."""
    return not name.startswith("optim") and ("epoch" in name or find_step_in_name(name) is not None)


def weights_in_dcp(found: DcpFile, home: Path, prefix: str = "") -> Weights:
    """The weights of a checkpoint in the snapshot's folder `home`, with its parts.

    Raises:
        NoWeightsError: there are none under the usual keys.
    """
    key = _weights_key(found.folder, found.as_torch.tree)
    tensors, rough = weights_of(found.as_torch, at(found.as_torch.tree, key))
    return Weights(parts_of(found, home, "state", key), tensors, rough).under(prefix, home)


def state_parts(folder: Path, home: Path, role: Role) -> tuple[Part, ...]:
    """The parts of a checkpoint without weights in the snapshot's folder `home`: an optimiser's, or a loop's."""
    return parts_of(read_dcp(folder), home, role)


def parts_of(found: DcpFile, home: Path, role: Role, key: TreePath = ()) -> tuple[Part, ...]:
    """The metadata, which stand for the whole, and the files of data that they name."""
    files = sorted({item.file for item in found.items})
    data = [Part(found.folder / file, _name(found.folder / file, home), "data") for file in files]
    metadata = found.folder / METADATA
    return Part(metadata, _name(metadata, home), role, found, weights_key=key), *data


def _name(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix()


def _weights_key(path: Path, tree: dict[Any, Any]) -> TreePath:
    """Where the weights are: under one of the usual keys, the highest first; torchtitan keeps them at the top."""
    nodes = walk(tree, enters=lambda path, node: isinstance(node, dict) and len(path) < _DEPTH - 1)
    for above, holder in sorted(nodes, key=lambda found: len(found[0])):
        for key in WEIGHT_KEYS:
            if isinstance(holder, dict) and isinstance(holder.get(key), dict):
                return (*above, key)
    raise NoWeightsError(
        f"{path}: no weights found: expected tensors, or a dict of them under {', '.join(WEIGHT_KEYS[:3])};"
        f" found {sorted(map(str, tree))[:8]}",
        hint="save the weights under 'model'",
    )
