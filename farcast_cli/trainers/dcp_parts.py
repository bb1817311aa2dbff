"""A distributed checkpoint of torch's as parts of a snapshot, whatever folder inside the snapshot it lies in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from farcast_cli.formats.dcp_file import METADATA, DcpFile
from farcast_cli.trainers.base import Part, weights_in, weights_of
from farcast_cli.trainers.names import find_step_in_name
from farcast_cli.trainers.networks import Networks, find_networks
from farcast_cli.trainers.weights_folder import Weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from farcast_cli.trainers.base import Role

ENDING = ".distcp"


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a distributed checkpoint, or was to be one."""
    return folder.is_dir() and ((folder / METADATA).is_file() or any(folder.glob(f"*{ENDING}")))


def inner_checkpoints(path: Path) -> list[Path]:
    """The distributed checkpoints in folders of a snapshot's folder: `model/`, `optim/`, `optimizer_0/`."""
    return [folder for folder in sorted(path.iterdir()) if is_dcp(folder) and not is_snapshot_name(folder.name)]


def is_snapshot_name(name: str) -> bool:
    """Whether a folder's name says that it is a snapshot by itself, and no part of one."""
    return not name.startswith("optim") and ("epoch" in name or find_step_in_name(name) is not None)


def weights_in_dcp(found: DcpFile, home: Path, prefix: str = "", chosen: Sequence[str] = ()) -> tuple[Weights, Networks]:
    """The weights of a checkpoint in the snapshot's folder `home`, with its parts; and where they lie in its tree.

    Args:
        chosen: the dotted keys of the networks; by default all that there are.

    Raises:
        NoWeightsError: there are none.
    """
    tree = found.as_torch.tree
    weights = find_networks(found.folder, tree, chosen, may_be_bare=False)
    tensors, rough = weights_of(found.as_torch, weights_in(found.folder, tree, weights.networks))
    return Weights(parts_of(found, home, "state", weights), tensors, rough).under(prefix, home), weights


def parts_of(found: DcpFile, home: Path, role: Role, weights: Networks | None = None) -> tuple[Part, ...]:
    """The metadata, which stand for the whole, and the files of data that they name."""
    files = sorted({item.file for item in found.items})
    data = [Part(found.folder / file, _name(found.folder / file, home), "data") for file in files]
    part = Part(found.folder / METADATA, _name(found.folder / METADATA, home), role, found)
    return replace(part, networks=weights.networks, averages=weights.averages) if weights else part, *data


def _name(path: Path, home: Path) -> str:
    return path.relative_to(home).as_posix()
