"""torch.distributed.checkpoint folders as outputs: items one behind the other, and the metadata that say where each lies.

A folder has the origin's items with those that changed written anew, or items of another checkpoint's tensors and objects.

Source: torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.pieces import Copy, Fixed, OutputFile, Piece, Planned, Section
from farcast_cli.checkpoint.torch_output import new_torch_file, plan_storages, ref_of
from farcast_cli.errors import UsageError
from farcast_cli.formats.copied_file import refuse_code_in_stretch
from farcast_cli.formats.dcp_file import METADATA, DcpFile, Item
from farcast_cli.formats.torch_pickle import Made, Name, StorageRef, TensorRef, encode_pickle
from farcast_cli.formats.tree import at, dotted
from farcast_cli.optional import need

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from farcast_cli.checkpoint.contents import Leaf
    from farcast_cli.checkpoint.pieces import Rewrite
    from farcast_cli.checkpoint.torch_output import Storages
    from farcast_cli.state.advance import StateTree

    Content = Mapping[str, tuple[Piece, ...]] | Section
    Stretch = tuple[int, int]

DCP_FILE = "__0_0.distcp"


def rewritten_folder(dcp: DcpFile, state: StateTree, rewrite: Rewrite) -> list[OutputFile]:
    """The origin's files with the items that changed written anew, and metadata that say where all of them lie now."""
    items, metadata = copy.deepcopy((dcp.items, dcp.metadata))
    folder = PurePosixPath(state.part.name).parent
    storages = plan_storages(state, rewrite)
    outputs = []
    for name, group in groupby(sorted(items, key=lambda item: item.stretch), key=lambda item: item.file):
        its_items = list(group)
        output, stretches = _items_file(str(folder / name), (_rewritten(dcp, item, state, storages) for item in its_items))
        outputs.append(output)
        for item, (offset, length) in zip(its_items, stretches, strict=True):
            item.info.states[0] |= {"offset": offset, "length": length}
    _retype(metadata, items, state, storages.retyped)
    return [*outputs, _metadata_file(state.part.name, encode_pickle(metadata))]


def new_folder(leaves: Sequence[Leaf]) -> list[OutputFile]:
    """A folder of tensors and objects: one file of items, and the metadata."""
    output, stretches = _items_file(DCP_FILE, map(_new, leaves))
    return [output, _metadata_file(METADATA, _new_metadata(leaves, stretches))]


def _items_file(name: str, items: Iterable[Content]) -> tuple[OutputFile, list[Stretch]]:
    """A file of items one behind the other, each a small torch file or a copied stretch; and where each lies: (offset, bytes)."""
    sections: list[Section] = []
    stretches = []
    position = 0
    for item in items:
        made = [item] if isinstance(item, Section) else new_torch_file(item, start=position)
        num_bytes = sum(section.num_bytes for section in made)
        sections += made
        stretches.append((position, num_bytes))
        position += num_bytes
    return OutputFile(name, tuple(sections)), stretches


def _metadata_file(name: str, pickled: bytes) -> OutputFile:
    return OutputFile(name, (Section((Fixed(pickled),)),))


def _tensor(ref: TensorRef, pieces: tuple[Piece, ...]) -> Content:
    return {"data.pkl": (Fixed(encode_pickle(ref)),), "data/0": pieces}


# --- the origin's items ----------------------------------------------------------------------------------------------


def _rewritten(dcp: DcpFile, item: Item, state: StateTree, storages: Storages) -> Content:
    """An item as it is written; as the origin has it where nothing in it can change."""
    if not item.place:
        return _as_it_was(dcp, item)
    value = at(state.tree, item.place)
    if not isinstance(value, TensorRef):
        return {"data.pkl": (Fixed(encode_pickle(value)),)}
    storage = value.storage
    if storage.key not in storages.retyped and storage.key not in storages.overlays and storage.size != 1:
        return _as_it_was(dcp, item)
    alone = replace(storages.retyped.get(storage.key, storage), key="0")
    return _tensor(replace(value, storage=alone, dtype=alone.dtype), storages.pieces(state, storage))


def _as_it_was(dcp: DcpFile, item: Item) -> Section:
    path = dcp.folder / item.file
    refuse_code_in_stretch(path, item.offset, item.num_bytes)
    return Section((Copy(path, item.offset, item.num_bytes),))


def _retype(metadata: Made, items: Iterable[Item], state: StateTree, retyped: Mapping[str, StorageRef]) -> None:
    """Note the new element types of tensors in the metadata."""
    for item in items:
        value = at(state.tree, item.place) if item.place else None
        if isinstance(value, TensorRef) and value.storage.key in retyped:
            properties = metadata.states[0]["state_dict_metadata"][item.name].states[0]["properties"]
            dtype = retyped[value.storage.key].dtype
            properties.states[0] = (Name("torch", dtype.name), *properties.states[0][1:])


# --- new items -------------------------------------------------------------------------------------------------------


def _new(leaf: Leaf) -> Content:
    if isinstance(leaf.value, Planned):
        return _tensor(ref_of(leaf.value, "0"), leaf.value.pieces)
    pickled = encode_pickle(leaf.value, {storage.key: storage for storage, _ in leaf.held})
    return {"data.pkl": (Fixed(pickled),), **{f"data/{storage.key}": pieces for storage, pieces in leaf.held}}


def _new_metadata(leaves: Sequence[Leaf], stretches: Sequence[tuple[int, int]]) -> bytes:
    """`.metadata` as torch's own writer pickles it."""
    need("torch", "--layout dcp")
    import torch.distributed.checkpoint.metadata as dcp
    from torch import Size
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    known: dict[str, dcp.STORAGE_TYPES] = {}
    stored = {}
    for leaf, (offset, length) in zip(leaves, stretches, strict=True):
        name, tensor = dotted(leaf.path), leaf.value if isinstance(leaf.value, Planned) else None
        if name in known:
            raise UsageError(f"--layout dcp: two items would be called {name!r}", hint="leave --layout out")
        known[name] = _tensor_metadata(leaf) if tensor else dcp.BytesStorageMetadata()
        index = dcp.MetadataIndex(name, Size([0] * len(tensor.shape)), 0) if tensor else dcp.MetadataIndex(name)
        stored[index] = _StorageInfo(DCP_FILE, offset, length)
    paths = {dotted(leaf.path): leaf.path for leaf in leaves}
    return pickle.dumps(dcp.Metadata(known, planner_data=paths, storage_data=stored))


def _tensor_metadata(leaf: Leaf) -> Any:
    import torch
    import torch.distributed.checkpoint.metadata as dcp

    properties = dcp.TensorProperties(dtype=getattr(torch, leaf.value.dtype.name), requires_grad=leaf.requires_grad)
    shape = torch.Size(leaf.value.shape)
    return dcp.TensorStorageMetadata(properties, shape, [dcp.ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)])
