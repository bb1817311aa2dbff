"""What the parts of a checkpoint hold, tensor by tensor, whatever container they are in.

Knows how to take tensors out of the storages that they share, and how to join what was sharded. Each comes as pieces of
the origin's files and of the forecast, and none is ever whole in memory.

Source: torch/distributed/checkpoint, _traverse.py and default_planner.py, for what lies where in such a folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.pieces import Copy, Fixed, Piece, Planned, Rewrite, Zeros
from farcast_cli.checkpoint.torch_output import Storages, plan_storages
from farcast_cli.errors import FileFormatError, UsageError, listed
from farcast_cli.formats.dcp_file import METADATA, DcpFile, Item, tensor_of
from farcast_cli.formats.safetensors_file import SafetensorsFile
from farcast_cli.formats.torch_file import TorchFile
from farcast_cli.formats.torch_pickle import UNTYPED, Made, StorageRef, TensorRef, in_collection, is_streamable
from farcast_cli.formats.tree import at, dotted, walk
from farcast_cli.optional import need
from farcast_cli.state.advance import StateTree, storages_of
from farcast_cli.tensors import is_row_major

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from farcast_cli.formats.tree import TreePath
    from farcast_cli.state.advance import Advanced
    from farcast_cli.trainers.base import Part

_BY_TORCH = "--layout same, then python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor or an object of a tree, and the keys that lead to it."""

    path: TreePath
    value: Planned | Any
    held: tuple[tuple[StorageRef, tuple[Piece, ...]], ...] = ()
    """The storages of an object that has tensors inside."""
    requires_grad: bool = False


def weights_in(part: Part, advanced: Advanced, rewrite: Rewrite) -> list[Planned]:
    """The weights of a part, by their names in its file; what is odd about them goes to the notes.

    Raises:
        UsageError: a tensor that cannot be taken out of its file by itself.
    """
    rewrite = rewrite.within(part.prefix)
    if isinstance(part.content, DcpFile):
        return list(_weights_in_dcp(part, part.content, advanced, rewrite))
    if isinstance(part.content, SafetensorsFile):
        return [rewrite.planned(entry) for entry in part.content.entries]
    source = _Source.of(_state_tree_of(part, advanced), rewrite)
    found = list(_leaves(part.weights_in(source.state.tree)))
    advanced.notes += _not_tensors((path, leaf) for path, leaf in found)
    advanced.notes += _tied(found)
    return [source.planned(path, leaf) for path, leaf in found if _is_tensor(leaf)]


def tree_in(part: Part, advanced: Advanced, rewrite: Rewrite) -> Iterator[Leaf]:
    """All that a state file holds, taken apart as torch's planner does it, or as it took it apart.

    Raises:
        UsageError: a tensor that cannot be taken out of its file by itself.
    """
    state = _state_tree_of(part, advanced)
    if isinstance(part.content, DcpFile):
        return _tree_in_dcp(part.content, state, rewrite)
    return _tree_in_torch(_Source.of(state, rewrite), advanced)


def keys_beside_weights(part: Part) -> Iterator[str]:
    """What a state file holds beside the weights."""
    file = part.torch_file
    assert file is not None  # noqa: S101 - what a state file is read into
    paths = {one.path for one in part.networks}
    ways = {path[:depth] for path in paths for depth in range(len(path))}
    yield from (
        dotted((*way, key)) for way in sorted(ways, key=str) for key in at(file.tree, way) if (*way, key) not in paths | ways
    )


# --- torch files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """A torch file's tree, and where the bytes of each of its storages come from."""

    state: StateTree
    retyped: dict[str, StorageRef]
    pieces: dict[str, tuple[Piece, ...]]

    @classmethod
    def of(cls, state: StateTree, rewrite: Rewrite) -> _Source:
        planned = plan_storages(state, rewrite)
        known = storages_of(state.tree)
        retyped = {one.key: planned.retyped.get(one.key, one) for one in known}
        return cls(state, retyped, {one.key: planned.pieces(state, one) for one in known})

    def planned(self, path: TreePath, leaf: object) -> Planned:
        """A tensor by itself, out of the storage that it may share with others."""
        name = dotted(path)
        if not isinstance(leaf, TensorRef):
            raise UsageError(f"tensor {name!r} has a type that only torch files can hold", hint="leave --layout out")
        if not is_streamable(leaf):
            raise UsageError(f"tensor {name!r} is a view that is not contiguous", hint="leave --layout out")
        storage = self.retyped[leaf.storage.key]
        dtype = leaf.dtype if storage.dtype == UNTYPED else storage.dtype
        begin = leaf.offset * dtype.itemsize
        pieces = cut(self.pieces[storage.key], begin, begin + dtype.bytes_of(prod(leaf.shape)))
        return Planned(name, dtype, leaf.shape, pieces, _strides(leaf))


def _state_tree_of(part: Part, advanced: Advanced) -> StateTree:
    if part.name in advanced.trees:
        return advanced.trees[part.name]
    assert isinstance(part.content, TorchFile)  # noqa: S101 - weights in a separate file, which no trainer's state is
    return StateTree(part, part.content.tree, part.content)


def _strides(ref: TensorRef) -> tuple[int, ...]:
    """Those that are not a contiguous tensor's."""
    return () if is_row_major(ref.shape, ref.stride) else ref.stride


def _leaves(tree: Any) -> Iterator[tuple[TreePath, Any]]:
    """What a state dict holds, with the keys that lead to it."""
    return ((path, node) for path, node in walk(tree, below=in_collection) if in_collection(node) is None)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, TensorRef) or (isinstance(leaf, Made) and leaf.maker.name.startswith("_rebuild_"))


def _not_tensors(leaves: Iterable[tuple[TreePath, Any]]) -> list[str]:
    names = [dotted(path) for path, leaf in leaves if not _is_tensor(leaf)]
    return [f"left out because they are not tensors: {listed(names)}"] if names else []


def _tied(leaves: Iterable[tuple[TreePath, Any]]) -> list[str]:
    """A note on names that share their values with an earlier one."""
    seen: set[tuple[str, int, int]] = set()
    again = []
    for path, leaf in leaves:
        if isinstance(leaf, TensorRef) and prod(leaf.shape) > 0:
            place = leaf.storage.key, leaf.offset, prod(leaf.shape)
            again += [dotted(path)] if place in seen else []
            seen.add(place)
    return [f"tied weights are written separately, each with its own values: {listed(again)}"] if again else []


def _tree_in_torch(source: _Source, advanced: Advanced) -> Iterator[Leaf]:
    need("torch", "--layout dcp")
    from torch.distributed.checkpoint._traverse import traverse_state_dict

    found: list[tuple[TreePath, Any]] = []
    traverse_state_dict(source.state.tree, lambda path, value: found.append((path, value)), _is_tensor)
    advanced.notes += _tied(found)
    for path, value in found:
        if _is_tensor(value):
            grad = isinstance(value, TensorRef) and value.requires_grad
            yield Leaf(path, source.planned(path, value), requires_grad=grad)
        else:
            keys = [one.key for one in storages_of(value)]
            yield Leaf(path, value, tuple((source.retyped[key], source.pieces[key]) for key in keys))


# --- stretches of pieces ---------------------------------------------------------------------------------------------


def cut(pieces: Iterable[Piece], begin: int, end: int) -> tuple[Piece, ...]:
    """Bytes [begin, end) of what pieces make up."""
    found, position = [], 0
    for piece in pieces:
        low, high = max(begin - position, 0), min(end - position, piece.num_bytes)
        if low < high:
            found.append(piece if high - low == piece.num_bytes else _stretch_of(piece, low, high))
        position += piece.num_bytes
    return tuple(found)


def _stretch_of(piece: Piece, low: int, high: int) -> Piece:
    if isinstance(piece, Fixed):
        return Fixed(piece.data[low:high])
    if isinstance(piece, Zeros):
        return Zeros(high - low)
    if isinstance(piece, Copy):
        return replace(piece, offset=piece.offset + low, num_bytes=high - low)
    first, count = low // piece.dtype.itemsize, (high - low) // piece.dtype.itemsize
    offset = piece.entry.offset + first * piece.entry.dtype.itemsize
    return replace(piece, entry=replace(piece.entry, shape=(count,), offset=offset, strides=()), begin=piece.begin + first)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor or an object of a dcp folder, the keys that lead to it, and the items that it is stored as."""

    name: str
    path: TreePath
    items: list[Item]
    shape: tuple[int, ...] | None
    """Of the whole tensor; None for an object."""

    @property
    def place(self) -> TreePath:
        """Where it stands in the tree that was read; () for an object that was left unread."""
        place = self.items[0].place
        return place[:-1] if _offsets(self.items[0]) else place


def _stored(dcp: DcpFile) -> Iterator[_Stored]:
    """All that a dcp folder holds, in the order of its metadata."""
    fields = dcp.metadata.states[0]
    paths = fields.get("planner_data") or {}
    items: dict[str, list[Item]] = {}
    for item in dcp.items:
        items.setdefault(item.name, []).append(item)
    for name, info in fields["state_dict_metadata"].items():
        if name not in items:
            raise FileFormatError(f"{dcp.folder / METADATA}: {name!r} is stored nowhere", hint="save the checkpoint again")
        shape = tuple(info.states[0]["size"]) if info.maker.name == "TensorStorageMetadata" else None
        path = paths.get(name)
        yield _Stored(name, path if isinstance(path, tuple) and path else (name,), items[name], shape)


def _offsets(item: Item) -> tuple[int, ...]:
    """Where a shard begins in its tensor, by the last key of its place; () where the item is no shard."""
    last = str(item.place[-1]) if item.place else ""
    return tuple(map(int, last[1:].split(","))) if re.fullmatch(r"@\d+(,\d+)*", last) else ()


def _weights_in_dcp(part: Part, dcp: DcpFile, advanced: Advanced, rewrite: Rewrite) -> Iterator[Planned]:
    state = advanced.trees[part.name]
    storages = plan_storages(state, rewrite)
    weights = [(name, one) for one in _stored(dcp) if (name := part.name_of(one.place)) is not None]
    advanced.notes += _not_tensors((path, None) for path, one in weights if one.shape is None)
    for path, one in weights:
        if one.shape is not None:
            yield replace(_whole(dcp, one, state, storages), name=dotted(path))


def _tree_in_dcp(dcp: DcpFile, state: StateTree, rewrite: Rewrite) -> Iterator[Leaf]:
    storages = plan_storages(state, rewrite)
    for one in _stored(dcp):
        if one.shape is not None:
            yield Leaf(one.path, _whole(dcp, one, state, storages))
        elif one.place:
            yield Leaf(one.path, at(state.tree, one.place))
        else:
            raise UsageError(
                f"{one.name!r} is a large object, or one with tensors inside: it can only be copied", hint=_BY_TORCH
            )


def _whole(dcp: DcpFile, one: _Stored, state: StateTree, storages: Storages) -> Planned:
    """A tensor as a whole: its shards, if it has any, must lie one behind the other along its first axis."""
    assert one.shape is not None  # noqa: S101 - the callers' branch
    items = sorted(one.items, key=_offsets)
    refs = [_ref_of(dcp, item, state) for item in items]
    if [ref.shape for ref in refs] != [one.shape]:
        _check_rows(one, items, refs)
    storage = storages.retyped.get(refs[0].storage.key, refs[0].storage)
    dtype = refs[0].dtype if storage.dtype == UNTYPED else storage.dtype
    pieces = tuple(piece for ref in refs for piece in storages.pieces(state, ref.storage))
    return Planned(one.name, dtype, one.shape, pieces, _strides(refs[0]) if len(refs) == 1 else ())


def _check_rows(one: _Stored, items: Sequence[Item], refs: Sequence[TensorRef]) -> None:
    """Refuse shards that are not the rows of their tensor, in order and complete."""
    shape = one.shape or ()
    row = 0
    for item, ref in zip(items, refs, strict=True):
        begins = _offsets(item) == (row, *(0 for _ in shape[1:])) and ref.shape[1:] == shape[1:]
        if not begins or not is_row_major(ref.shape, ref.stride):
            break
        row += ref.shape[0]
    if not shape or row != shape[0]:
        raise UsageError(f"tensor {one.name!r} is not sharded along its first axis", hint=_BY_TORCH)


def _ref_of(dcp: DcpFile, item: Item, state: StateTree) -> TensorRef:
    """A tensor as its own small file has it, under the storage that the tree knows it by."""
    ref, _ = tensor_of(dcp.folder, item)
    if not is_streamable(ref) or ref.storage.num_bytes != ref.dtype.bytes_of(prod(ref.shape)):
        raise UsageError(f"tensor {item.name!r} is stored as a view of another", hint=_BY_TORCH)
    known: TensorRef = at(state.tree, item.place)
    return replace(ref, storage=replace(ref.storage, key=known.storage.key))
