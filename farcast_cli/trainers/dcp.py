"""torch.distributed.checkpoint folders, as FSDP trainers and torchtitan write them: `step-1000/` with `.metadata`.

Lightning and Fabric put all but the weights and the optimizer into a torch file beside it, meta.pt.

Source: torch/distributed/checkpoint; pytorch/torchtitan, components/checkpoint.py, for the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from farcast_cli.formats.dcp_file import METADATA, DcpFile, read_dcp
from farcast_cli.formats.tree import at
from farcast_cli.trainers.base import Layout, Part, Snapshot, name_evidence, weights_in, weights_of
from farcast_cli.trainers.folder_files import files_below
from farcast_cli.trainers.networks import Networks, find_networks
from farcast_cli.trainers.side_files import beside, counted_steps, side_parts
from farcast_cli.trainers.torch_payload import adam_evidence, payload_evidence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ENDING = ".distcp"


def _recognises(path: Path) -> bool:
    return path.is_dir() and ((path / METADATA).is_file() or any(path.glob(f"*{ENDING}")))


def _read(path: Path, chosen: Sequence[str] = ()) -> Snapshot:
    found = read_dcp(path)
    tree = found.as_torch.tree
    weights = find_networks(path, tree, chosen, may_be_bare=False)
    tensors, rough = weights_of(found.as_torch, weights_in(path, tree, weights.networks))
    known = {item.file for item in found.items}
    own = [part for file, name in files_below(path) if (part := _part(file, name, found, weights, known))]
    others, notes = side_parts(path, own)
    holder, name = at(tree, weights.holder), name_evidence(path)
    counted = payload_evidence(tree, found.as_torch) or counted_steps(others, name)
    evidence = (*counted, *adam_evidence(found.as_torch, holder), *name)
    return Snapshot(
        path,
        LAYOUT.name,
        (*own, *others),
        tensors,
        evidence,
        not_streamable=rough,
        beside=(*weights.told, *beside(others)),
        notes=notes,
    )


def _part(file: Path, name: str, found: DcpFile, weights: Networks, known: set[str]) -> Part | None:
    """A file of the container itself; None for what lies beside it, such as Lightning's meta.pt."""
    if name == METADATA:
        return Part(file, name, "state", found, networks=weights.networks, averages=weights.averages)
    return Part(file, name, "data") if name in known else None


LAYOUT = Layout("dcp", _recognises, _read, read_chosen=_read)
