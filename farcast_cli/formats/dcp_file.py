"""A torch.distributed.checkpoint folder: `.metadata` says in which stretch of which `.distcp` file each item lies.

Read as one tree with tensors in it, like a torch file, so that whatever moves a trainer's state on works for both. An
item is one shard of a tensor, or one plain object; each is a small torch file of its own. Tensors that nobody asks for
are not looked up. Torch's own reader unpickles `.metadata` as code; this one never does.

Source: torch/distributed/checkpoint/metadata.py, filesystem.py.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from math import prod
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.formats.copied_file import refuse_code_in_stretch
from farcast_cli.formats.torch_file import MAX_PICKLE_BYTES, TorchFile, read_torch_stretch
from farcast_cli.formats.torch_pickle import Made, Name, StorageRef, TensorRef, decode_pickle, iter_storages
from farcast_cli.formats.tree import TreePath, dotted, walk
from farcast_cli.formats.zip_file import ZipMember
from farcast_cli.tensors import DTYPES, DType, row_major_strides

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METADATA = ".metadata"
PREFIX = "dcp"
TOP_LEVEL = "model"
"""The key under which tensors of the top level stand: torchtitan keeps its weights there."""
_MODULE = "torch.distributed.checkpoint.metadata"
_MIN_ITEM_BYTES = 256  # of one shard in its file
_PLAIN_BYTES = 1 << 26  # of one object that is no tensor


@dataclass(frozen=True, slots=True)
class Item:
    """One shard of a tensor, or one object: its stretch of a file, and where it stands in the tree (() if it does not)."""

    name: str
    file: str
    offset: int
    num_bytes: int
    place: TreePath
    info: Made
    """Its entry in the metadata, which names the stretch."""

    @property
    def stretch(self) -> tuple[str, int]:
        return self.file, self.offset


@dataclass(frozen=True, slots=True)
class DcpFile:
    """A checkpoint as one torch file would hold it, and the items that it is made of."""

    folder: Path
    as_torch: TorchFile
    items: tuple[Item, ...]
    metadata: Made

    @property
    def digest(self) -> str:
        return self.as_torch.digest


@dataclass(frozen=True, slots=True)
class _Shard:
    """What the metadata say of one shard of a tensor."""

    dtype: DType
    shape: tuple[int, ...]
    label: str


class _Located(dict[str, ZipMember]):
    """Storage records by name, each looked up in its item when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.items_by_name: dict[str, Item] = {}

    def __missing__(self, name: str) -> ZipMember:
        found = tensor_of(self._folder, self.items_by_name[name])[1]
        self[name] = found
        return found


def read_dcp(folder: Path) -> DcpFile:
    """Read the metadata and the small items; of large tensors, nothing yet.

    Raises:
        HalfWrittenError: no `.metadata` (which is written last), or a file of tensors is missing or short.
        UnsafeFileError: the metadata name something that is no data, or a file outside of the folder.
        FileFormatError: the metadata are not what torch writes.
    """
    try:
        return _follow(folder)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{folder / METADATA}: not what torch writes: {type(error).__name__}: {error}", hint="leave the snapshot out"
        ) from error


def _follow(folder: Path) -> DcpFile:
    raw = _read_metadata(folder)
    sizes = {path.name: file_size(path) for path in folder.iterdir() if path.is_file()}
    stored = sum(size for name, size in sizes.items() if name.endswith(".distcp"))
    metadata = decode_pickle(folder / METADATA, raw, num_records=stored // _MIN_ITEM_BYTES)
    fields = _fields(metadata, "Metadata", folder)
    shards = {name: _shards(found, folder, name) for name, found in fields["state_dict_metadata"].items()}
    paths = fields.get("planner_data") or {}
    records = _Located(folder)
    tree: dict[Any, Any] = {}
    items = []
    for index, info in fields["storage_data"].items():
        named = _fields(index, "MetadataIndex", folder)
        shard = _shard_of(named, shards, folder)
        path = paths.get(named["fqn"], (named["fqn"],))
        place = _place(path if isinstance(path, tuple) and path else (named["fqn"],), is_tensor=shard is not None)
        item, value = _value(folder, _checked_item(folder, named["fqn"], info, place, sizes=sizes), shard, records)
        if item.place:
            _put(tree, item.place, value)
        items.append(item)
    assert isinstance(metadata, Made)  # noqa: S101 - _fields has looked
    digest = hashlib.sha256(raw).hexdigest()
    size = sum(item.num_bytes for item in items)
    file = TorchFile(folder / METADATA, _with_lists(tree), records, PREFIX, size, digest)
    return DcpFile(folder, _with_groups(file, items), tuple(items), metadata)


def tensor_of(folder: Path, item: Item) -> tuple[TensorRef, ZipMember]:
    """The tensor of an item and the record that holds its storage; costs a few small reads."""
    file = read_torch_stretch(folder / item.file, item.offset, item.num_bytes)
    if not isinstance(file.tree, TensorRef):
        raise FileFormatError(f"{folder / item.file}: {item.name!r} is no tensor, though {METADATA} says so")
    return file.tree, file.storage_record(file.tree.storage)


# --- metadata --------------------------------------------------------------------------------------------------------


def _read_metadata(folder: Path) -> bytes:
    path = folder / METADATA
    if not path.is_file():
        raise HalfWrittenError(f"{folder}: no {METADATA}, which is written last", hint="leave it out: it was not finished")
    size = file_size(path)
    if size > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{path}: {size} bytes, over the limit of {MAX_PICKLE_BYTES}")
    return read_bytes(path, 0, size)


def _fields(made: object, kind: str, folder: Path) -> dict[str, Any]:
    """The attributes of a carried dataclass of torch's."""
    if isinstance(made, Made) and made.maker.name == kind and len(made.states) == 1 and isinstance(made.states[0], dict):
        return made.states[0]
    raise FileFormatError(f"{folder / METADATA}: expected torch's {kind}, found {str(made)[:60]}")


def _shards(found: object, folder: Path, name: str) -> dict[tuple[int, ...], _Shard] | None:
    """A tensor's shards by their offsets; None for an object that is no tensor."""
    if isinstance(found, Made) and found.maker.name == "BytesStorageMetadata":
        return None
    fields = _fields(found, "TensorStorageMetadata", folder)
    match fields["properties"]:
        case Made(states=[(Name(name=code), *_)]) if code in DTYPES:
            dtype = DTYPES[code]
        case _:
            raise FileFormatError(f"{folder / METADATA}: the type of tensor {name!r} is not known")
    chunks = [_fields(chunk, "ChunkStorageMetadata", folder) for chunk in fields["chunks"]]
    single = len(chunks) == 1
    return {
        tuple(c["offsets"]): _Shard(dtype, tuple(c["sizes"]), "" if single else "@" + ",".join(map(str, c["offsets"])))
        for c in chunks
    }


def _checked_item(folder: Path, name: str, info: object, place: TreePath, *, sizes: dict[str, int]) -> Item:
    """An item, seen to lie inside its file; `sizes` are those of the folder's files."""
    stretch = _fields(info, "_StorageInfo", folder)
    file, offset, length = stretch["relative_path"], stretch["offset"], stretch["length"]
    if not isinstance(file, str) or PurePath(file).name != file or file in {"", ".", ".."}:
        raise UnsafeFileError(f"{folder / METADATA}: {str(file)[:80]!r} lies outside the folder")
    if stretch.get("transform_descriptors"):
        raise FileFormatError(f"{folder}: {name!r} is compressed or encrypted", hint="save it without extensions")
    if not all(isinstance(n, int) and n >= 0 for n in (offset, length)):
        raise FileFormatError(f"{folder / METADATA}: {name!r} lies at {offset}, {length} bytes")
    if sizes.get(file, -1) < offset + length:
        raise HalfWrittenError(f"{folder}: {file} is missing or too short for {name!r}", hint="leave the snapshot out")
    assert isinstance(info, Made)  # noqa: S101 - _fields has looked
    return Item(name, file, offset, length, place, info)


def _shard_of(index: dict[str, Any], shards: dict[str, dict[tuple[int, ...], _Shard] | None], folder: Path) -> _Shard | None:
    name, offset = index.get("fqn"), index.get("offset")
    if not isinstance(name, str) or not name.isprintable():
        raise FileFormatError(f"{folder / METADATA}: an item's name is {str(name)[:40]!r}, which is no printable text")
    if name not in shards:
        raise FileFormatError(f"{folder / METADATA}: {name!r} is stored, but nothing says what it is")
    known = shards[name]
    if known is None:
        return None
    found = known.get(tuple(offset)) if offset is not None else next(iter(known.values()), None)
    if found is None:
        raise FileFormatError(f"{folder / METADATA}: {name!r} has no shard at {offset}")
    return found


# --- values ----------------------------------------------------------------------------------------------------------


def _value(folder: Path, item: Item, shard: _Shard | None, records: _Located) -> tuple[Item, object]:
    """What an item puts into the tree; an object that holds tensors of its own is left out, and copied as it is."""
    if shard is None:
        if item.num_bytes > _PLAIN_BYTES:
            refuse_code_in_stretch(folder / item.file, item.offset, item.num_bytes)
            return replace(item, place=()), None
        tree = read_torch_stretch(folder / item.file, item.offset, item.num_bytes).tree
        return (replace(item, place=()), None) if any(True for _ in iter_storages(tree)) else (item, tree)
    if shard.label:
        item = replace(item, place=(*item.place, shard.label))
    key = f"{item.name}{shard.label}"
    records.items_by_name[f"{PREFIX}/data/{key}"] = item
    if _is_state(item.place) and prod(shard.shape) > 1:
        return item, _assumed(key, shard)
    ref, record = tensor_of(folder, item)
    if (ref.dtype, ref.shape) != (shard.dtype, shard.shape):
        raise FileFormatError(
            f"{folder / item.file}: {item.name!r} is {ref.dtype.name} {list(ref.shape)},"
            f" expected {shard.dtype.name} {list(shard.shape)}"
        )
    records[f"{PREFIX}/data/{key}"] = record
    return item, replace(ref, storage=replace(ref.storage, key=key))


def _is_state(place: TreePath) -> bool:
    return any(key == "state" or (isinstance(key, str) and key.startswith("optim")) for key in place[:-1])


def _assumed(key: str, shard: _Shard) -> TensorRef:
    """An optimiser's tensor as the metadata have it: it is copied, or set to zero, and never looked into."""
    storage = StorageRef(key, shard.dtype, "cpu", prod(shard.shape))
    return TensorRef(storage, shard.dtype, 0, shard.shape, row_major_strides(shard.shape))


# --- the tree --------------------------------------------------------------------------------------------------------


def _place(path: TreePath, *, is_tensor: bool) -> TreePath:
    """Where an item stands.

    An optimiser that was saved flat, by parameter names, gets its own levels back, and tensors at the top a level.
    """
    *before, last = path
    if not before and is_tensor:
        return (TOP_LEVEL, last)
    if before and isinstance(last, str):
        head, _, rest = last.partition(".")
        name, _, leaf = rest.rpartition(".")
        if head in {"state", "param_groups"} and name:
            return (*before, head, name, leaf)
    return path


def _put(tree: dict[Any, Any], place: TreePath, value: object) -> None:
    for key in place[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise FileFormatError(f"{METADATA}: {dotted(place)} stands inside another item")
    tree[place[-1]] = value


def _with_lists(tree: Any) -> Any:
    """The tree with a list where keys are 0, 1, 2 and so on."""
    if not isinstance(tree, dict):
        return tree
    made = {key: _with_lists(value) for key, value in tree.items()}
    numbered = bool(made) and all(type(key) is int for key in made) and sorted(made) == list(range(len(made)))
    return [made[index] for index in range(len(made))] if numbered else made


def _with_groups(file: TorchFile, items: list[Item]) -> TorchFile:
    """The tree with one parameter group in place of the many, one for each parameter, that a flat optimiser has.

    The items of the many then stand at the one.
    """
    for place, holder in list(_flat_groups(file.tree)):
        groups, number_of = _merged(holder["param_groups"])
        holder["param_groups"] = groups
        begin = (*place, "param_groups")
        for number, item in enumerate(items):
            if item.place[: len(begin)] == begin:
                _, leaf = item.place[len(begin) :]
                index = number_of[item.place[len(begin)]]
                items[number] = replace(item, place=(*begin, index, leaf))
    return file


def _flat_groups(tree: Any) -> Iterator[tuple[TreePath, dict[str, Any]]]:
    for place, node in walk(tree, enters=lambda place, node: isinstance(node, dict) and place[-1:] != ("param_groups",)):
        groups = node.get("param_groups") if isinstance(node, dict) else None
        if isinstance(groups, dict) and all(isinstance(group, dict) for group in groups.values()):
            yield place, node


def _merged(groups: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Groups of equal settings as one, and the number of each parameter's."""
    merged: list[dict[str, Any]] = []
    number_of = {}
    for name, group in groups.items():
        if group not in merged:
            merged.append(group)
        number_of[name] = merged.index(group)
    return merged, number_of
