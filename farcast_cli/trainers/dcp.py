"""torch.distributed.checkpoint folders, as FSDP trainers and torchtitan write them: `step-1000/` with `.metadata`.

Lightning and Fabric put all but the weights and the optimizer into a torch file beside it, meta.pt.

Source: torch/distributed/checkpoint; pytorch/torchtitan, components/checkpoint.py, for the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from farcast_cli.errors import NoWeightsError
from farcast_cli.formats.dcp_file import METADATA, DcpFile, read_dcp
from farcast_cli.formats.tree import at, walk
from farcast_cli.trainers.base import Layout, Part, Snapshot, name_evidence, weights_of
from farcast_cli.trainers.folder_files import files_below
from farcast_cli.trainers.side_files import beside, counted_steps, side_parts
from farcast_cli.trainers.torch_payload import WEIGHT_KEYS, adam_evidence, other_weights, payload_evidence

if TYPE_CHECKING:
    from pathlib import Path

    from farcast_cli.formats.tree import TreePath

ENDING = ".distcp"
_DEPTH = 3  # levels below which weights are looked for, as in app.model


def _recognises(path: Path) -> bool:
    return path.is_dir() and ((path / METADATA).is_file() or any(path.glob(f"*{ENDING}")))


def _read(path: Path) -> Snapshot:
    found = read_dcp(path)
    tree = found.as_torch.tree
    key = _weights_key(path, tree)
    weights = at(tree, key)
    tensors, rough = weights_of(found.as_torch, weights)
    known = {item.file for item in found.items}
    own = [part for file, name in files_below(path) if (part := _part(file, name, found, key, known))]
    others, notes = side_parts(path, own)
    holder, name = at(tree, key[:-1]), name_evidence(path)
    counted = payload_evidence(tree, found.as_torch) or counted_steps(others, name)
    evidence = (*counted, *adam_evidence(found.as_torch, holder), *name)
    return Snapshot(
        path,
        LAYOUT.name,
        (*own, *others),
        tensors,
        evidence,
        not_streamable=rough,
        beside=(*other_weights(holder, key[-1:]), *beside(others)),
        notes=notes,
    )


def _part(file: Path, name: str, found: DcpFile, key: TreePath, known: set[str]) -> Part | None:
    """A file of the container itself; None for what lies beside it, such as Lightning's meta.pt."""
    if name == METADATA:
        return Part(file, name, "state", found, weights_key=key)
    return Part(file, name, "data") if name in known else None


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


LAYOUT = Layout("dcp", _recognises, _read)
