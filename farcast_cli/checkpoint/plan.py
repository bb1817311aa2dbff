"""What the forecast checkpoint's files will hold: the origin's own files with stretches of bytes replaced.

A plan is made from headers alone and says for every output file, record by record, where its bytes come from. The
same tensors under the same names, in the same files, in the same order: whatever read the origin reads the forecast.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce
from itertools import groupby
from math import prod
from operator import and_
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import UsageError
from farcast_cli.files.json_text import UnreadList, encode_json
from farcast_cli.files.reading import file_size, mode_of
from farcast_cli.formats.copied_file import refuse_code_in, refuse_code_in_stretch
from farcast_cli.formats.dcp_file import DcpFile, Item
from farcast_cli.formats.safetensors_file import SafetensorsFile, encode_header
from farcast_cli.formats.torch_file import TorchFile, below
from farcast_cli.formats.torch_pickle import Made, Name, StorageRef, TensorRef, encode_pickle, is_streamable, iter_tensors
from farcast_cli.formats.torch_zip import frame
from farcast_cli.state.advance import Advanced, Change, StateTree, storages_of
from farcast_cli.tensors import DTYPES, FLOATING, DType, TensorEntry
from farcast_cli.trainers import named
from farcast_cli.trainers.base import ADAPTER_FILES, METADATA_STEPS, Part, Snapshot, find_step_in_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import OutputDType

    ValueMap = Callable[[NDArray[Any], int], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of one of the origin's files."""

    path: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Values:
    """A tensor's values in `dtype`: forecast tensor number `index`, or the origin's own where that is None."""

    entry: TensorEntry
    index: int | None
    dtype: DType
    non_negative: bool = False
    begin: int = 0
    """The element of the whole tensor that `entry` begins with, where it is a part of it."""
    function: ValueMap | None = None
    """What the origin's own values (N,) are put through, given the first one's place in the tensor. It works in the type of
    arithmetic, element by element: what becomes of one must not depend on which others come with it."""

    @property
    def num_bytes(self) -> int:
        return self.entry.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Fixed:
    """Bytes known in advance."""

    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Zeros:
    """So many zero bytes."""

    num_bytes: int


Piece = Copy | Values | Fixed | Zeros


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of an output file, made of pieces in order; its CRC-32 is written to `checksums_at` of the file."""

    pieces: tuple[Piece, ...]
    checksums_at: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """An output file; `name` is its path inside the checkpoint, "" where the checkpoint is that one file."""

    name: str
    records: tuple[Section, ...]
    mode: int = 0o666
    """Its permissions, and those of the folders that are made for it, within the umask."""
    folder_mode: int = 0o777

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.records)


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of the output: what it is, and where its bytes come from."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    strides: tuple[int, ...] = ()
    """In elements, where they are not those of a contiguous tensor."""

    @property
    def num_bytes(self) -> int:
        return self.dtype.bytes_of(prod(self.shape))


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the plan changes beside the weights: element type, shard size, BatchNorm's counts, the valid step."""

    index_of: Mapping[str, int]
    dtype: OutputDType = "source"
    max_shard_bytes: int | None = None
    batch_counts: Mapping[str, Change] = field(default_factory=dict)
    valid_step: int = 0
    mirror: bool = False
    """Whether the forecast also takes the place of an average that users load."""
    mapped: Mapping[str, ValueMap] = field(default_factory=dict)
    """What becomes of the values of some tensors, by name."""

    def out_dtype(self, dtype: DType) -> DType:
        return DTYPES[self.dtype] if self.dtype != "source" and dtype.name in FLOATING else dtype

    def within(self, prefix: str) -> Rewrite:
        """The same for a file whose tensors the snapshot knows under a prefix, by the file's own names."""

        def own(named: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

        if not prefix:
            return self
        return replace(self, index_of=own(self.index_of), batch_counts=own(self.batch_counts), mapped=own(self.mapped))

    def planned(self, entry: TensorEntry) -> Planned:
        """A tensor as it is written."""
        return Planned(entry.name, self.out_dtype(entry.dtype), entry.shape, self.pieces(entry), entry.strides)

    def pieces(self, entry: TensorEntry) -> tuple[Piece, ...]:
        """Where a tensor's bytes come from."""
        if entry.name in self.batch_counts:
            return (Fixed(struct.pack("<q", int(self.batch_counts[entry.name].new))),)
        index, dtype = self.index_of.get(entry.name), self.out_dtype(entry.dtype)
        if entry.name in self.mapped:
            return (Values(entry, None, dtype, function=self.mapped[entry.name]),)
        if index is None and dtype == entry.dtype:
            return (Copy(entry.path, entry.offset, entry.num_bytes),)
        real = entry.as_real()
        return (Values(real, index, dtype if real is entry else real.dtype, non_negative=entry.name.endswith("running_var")),)


def forecast_name(origin: Snapshot, horizon: int, *, unit: Fraction = Fraction(1), keep_step: bool = False) -> str:
    """The origin's own name with its step replaced, as wide as before: `step_001000.pt` becomes `step_001250.pt`.

    Args:
        unit: what the number in the name counts per step.
        keep_step: the counters inside stay at the origin, and so does the name, marked as a leap.
    """
    name, found = origin.path.name, find_step_in_name(origin.path.name)
    moved = unit * horizon
    stem, ending = (origin.path.stem, origin.path.suffix) if origin.path.is_file() else (name, "")
    if keep_step:
        return f"{stem}-leap{horizon}{ending}"
    if found is None or moved.denominator != 1:
        return f"{stem}-step{origin.step + horizon}{ending}"
    digits = str(int(found[1]) + int(moved)).zfill(len(found[1]))
    return name[: found.start(1)] + digits + name[found.end(1) :]


def plan_outputs(origin: Snapshot, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    """The files of the forecast checkpoint, planned from the origin's headers.

    Raises:
        UsageError: sharding asked of a checkpoint that is one file.
    """
    if rewrite.max_shard_bytes is not None:
        return _resharded(origin, advanced, rewrite)
    return [output for part in origin.parts for output in plan_part(part, advanced, rewrite)]


def with_modes(outputs: Iterable[OutputFile], origin: Snapshot) -> list[OutputFile]:
    """The same with the permissions of the origin's files; a file that the origin lacks gets what all of them allow."""
    modes = {part.name: mode_of(part.path) for part in origin.parts}
    shared = reduce(and_, modes.values(), 0o666)
    folder_mode = mode_of(origin.path) | 0o700 if origin.path.is_dir() else 0o777
    return [replace(output, mode=modes.get(output.name, shared) & 0o666 | 0o600, folder_mode=folder_mode) for output in outputs]


def plan_part(part: Part, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    if part.name in advanced.dropped or part.role == "data":
        return []
    if isinstance(part.content, DcpFile):
        return _dcp_outputs(part.content, advanced.trees[part.name], rewrite)
    return [_plan_file(part, advanced, rewrite)]


def _plan_file(part: Part, advanced: Advanced, rewrite: Rewrite) -> OutputFile:
    rewrite = rewrite.within(part.prefix)
    if part.name in advanced.trees:
        state = advanced.trees[part.name]
        return torch_output(state, rewrite) if state.file else json_output(part.name, state.tree)
    if isinstance(part.content, SafetensorsFile):
        planned = [rewrite.planned(entry) for entry in part.content.entries]
        return safetensors_output(part.name, planned, _metadata(part.content, rewrite))
    if isinstance(part.content, TorchFile) and part.role in {"weights", "state"}:
        return torch_output(StateTree(part, copy.deepcopy(part.content.tree), part.content), rewrite)
    if part.role == "weights-index" and rewrite.dtype != "source":
        raise UsageError(f"--dtype {rewrite.dtype} changes the shards' sizes", hint="add --max-shard-size 5GB")
    refuse_code_in(part.path)
    return OutputFile(part.name, (Section((Copy(part.path, 0, file_size(part.path)),)),))


def json_output(name: str, tree: Any) -> OutputFile:
    pieces = (
        Copy(piece.path, piece.offset, piece.num_bytes) if isinstance(piece, UnreadList) else Fixed(piece)
        for piece in encode_json(tree)
    )
    return OutputFile(name, (Section(tuple(pieces)),))


def _metadata(file: SafetensorsFile, rewrite: Rewrite) -> dict[str, str]:
    metadata = dict(file.metadata)
    return metadata | {key: str(rewrite.valid_step) for key in METADATA_STEPS if key in metadata}


def safetensors_output(name: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> OutputFile:
    header = encode_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), metadata)
    pieces = [piece for tensor in tensors for piece in tensor.pieces]
    return OutputFile(name, (Section((Fixed(header), *pieces)),))


# --- torch files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Storages:
    """What becomes of a state file's storages, by key: the stretches that are replaced, and other element types."""

    overlays: Mapping[str, list[tuple[int, int, Piece]]]
    retyped: Mapping[str, StorageRef]

    def pieces(self, state: StateTree, storage: StorageRef) -> tuple[Piece, ...]:
        """A storage's elements: the origin's, with the replaced stretches in their places."""
        dtype = self.retyped.get(storage.key, storage).dtype
        pieces: list[Piece] = []
        position = 0
        for first, count, piece in sorted(self.overlays.get(storage.key, []), key=lambda overlay: overlay[:2]):
            if first < position:
                continue  # a second name for the same elements
            if first > position:
                pieces.append(_origins(state, storage, dtype, position, first))
            pieces.append(piece)
            position = first + count
        if position < storage.size:
            pieces.append(_origins(state, storage, dtype, position, storage.size))
        return tuple(pieces)


def plan_storages(state: StateTree, rewrite: Rewrite) -> Storages:
    assert state.file is not None  # noqa: S101 - only torch files have storages
    weights = below(state.tree, state.part.weights_key) if state.part.role in {"weights", "state"} else {}
    mirror = below(state.tree, state.part.mirror_key) if rewrite.mirror and state.part.mirror_key else {}
    retyped = {
        ref.storage.key: replace(ref.storage, dtype=rewrite.out_dtype(ref.storage.dtype))
        for tree in (weights, mirror)
        for _, ref in iter_tensors(tree)
    }
    overlays = _overlays(state.file, weights, rewrite, mirror)
    for (key, first, count), data in state.literals.items():
        overlays.setdefault(key, []).append((first, count, Fixed(data)))
    itemsize = {storage.key: retyped.get(storage.key, storage).dtype.itemsize for storage in storages_of(state.tree)}
    for key, first, count in state.zeroed:
        if count and key in itemsize:
            overlays.setdefault(key, []).append((first, count, Zeros(count * itemsize[key])))
    return Storages(overlays, retyped)


def torch_output(state: StateTree, rewrite: Rewrite) -> OutputFile:
    """A torch file with a new pickle; its storages as they were, but for what is forecast, moved on or retyped."""
    file = state.file
    assert file is not None  # noqa: S101 - the caller's branch
    storages = plan_storages(state, rewrite)
    named: dict[str, tuple[Piece, ...]] = {f"{file.prefix}/data.pkl": (Fixed(encode_pickle(state.tree, storages.retyped)),)}
    named |= {
        name: (Copy(file.path, record.offset, record.num_bytes),)
        for name, record in file.records.items()
        if not name.startswith(f"{file.prefix}/data/") and name not in named
    }
    named |= {f"{file.prefix}/data/{one.key}": storages.pieces(state, one) for one in storages_of(state.tree)}
    return OutputFile(state.part.name, tuple(zip_records(named)))


_BESIDE = {".format_version": b"1", ".storage_alignment": b"64", "byteorder": b"little", "version": b"3\n"}
"""What torch.save puts beside the pickle and the storages."""


def new_torch_file(named: Mapping[str, tuple[Piece, ...]], *, start: int = 0) -> list[Section]:
    """A torch file of a pickle (`data.pkl`) and its storages (`data/KEY`) that begins at byte `start` of its file."""
    whole = {**named, **{name: (Fixed(data),) for name, data in _BESIDE.items()}}
    return list(zip_records({f"archive/{name}": pieces for name, pieces in whole.items()}, start=start))


def zip_records(named: Mapping[str, tuple[Piece, ...]], *, start: int = 0) -> Iterator[Section]:
    """A zip of named records that begins at byte `start` of its file."""
    framed = frame([(name, sum(piece.num_bytes for piece in pieces)) for name, pieces in named.items()])
    for head, pieces, places in zip(framed.heads, named.values(), framed.checksums_at, strict=True):
        yield Section((Fixed(head),))
        yield Section(pieces, tuple(start + place for place in places))
    yield Section((Fixed(framed.tail),))


def _overlays(file: TorchFile, weights: Any, rewrite: Rewrite, mirror: Any) -> dict[str, list[tuple[int, int, Piece]]]:
    """Replaced stretches of each storage: (first element, elements, piece).

    Args:
        mirror: a tree of tensors that get the forecast of the weights of the same names.
    """
    twins = {keys: ref for keys, ref in iter_tensors(mirror) if is_streamable(ref)}
    found: dict[str, list[tuple[int, int, Piece]]] = {}
    for keys, ref in iter_tensors(weights):
        entry = file.entry(".".join(map(str, keys)), ref)
        if any(entry.name in named for named in (rewrite.index_of, rewrite.batch_counts, rewrite.mapped)):
            (piece,) = rewrite.pieces(entry)
            twin = twins.get(keys)
            for place in (ref, twin) if twin and (twin.dtype, twin.stride) == (ref.dtype, ref.stride) else (ref,):
                found.setdefault(place.storage.key, []).append((place.offset, entry.num_elements, piece))
    return found


def _origins(state: StateTree, storage: StorageRef, dtype: DType, begin: int, end: int) -> Piece:
    """Elements [begin, end) of a storage as the origin has them."""
    assert state.file is not None  # noqa: S101
    record = state.file.storage_record(storage)
    place = record.offset + begin * storage.dtype.itemsize
    if dtype == storage.dtype:
        return Copy(record.path, place, (end - begin) * storage.dtype.itemsize)
    return Values(TensorEntry("", storage.dtype, (end - begin,), record.path, place), None, dtype)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def _dcp_outputs(dcp: DcpFile, state: StateTree, rewrite: Rewrite) -> list[OutputFile]:
    """The origin's files with the items that changed written anew, and metadata that say where all of them lie now."""
    items, metadata = copy.deepcopy((dcp.items, dcp.metadata))
    storages = plan_storages(state, rewrite)
    outputs = []
    for name, its_items in groupby(sorted(items, key=lambda item: item.stretch), key=lambda item: item.file):
        records: list[Section] = []
        position = 0
        for item in its_items:
            made = _item_records(dcp, item, state, storages, start=position)
            num_bytes = sum(record.num_bytes for record in made)
            item.info.states[0] |= {"offset": position, "length": num_bytes}
            records += made
            position += num_bytes
        outputs.append(OutputFile(name, tuple(records)))
    _retype(metadata, items, state, storages.retyped)
    return [*outputs, OutputFile(state.part.name, (Section((Fixed(encode_pickle(metadata)),)),))]


def _item_records(dcp: DcpFile, item: Item, state: StateTree, storages: Storages, *, start: int) -> list[Section]:
    """An item's small torch file; as the origin has it where nothing in it can change."""
    value = below(state.tree, item.place) if item.place else None
    named: dict[str, tuple[Piece, ...]]
    if not isinstance(value, TensorRef):
        if not item.place:
            return _as_it_was(dcp, item)
        named = {"data.pkl": (Fixed(encode_pickle(value)),)}
    else:
        storage = value.storage
        touched = storage.key in storages.retyped or storage.key in storages.overlays or storage.size == 1
        if not touched:
            return _as_it_was(dcp, item)
        alone = replace(storages.retyped.get(storage.key, storage), key="0")
        named = {
            "data.pkl": (Fixed(encode_pickle(replace(value, storage=alone, dtype=alone.dtype))),),
            "data/0": storages.pieces(state, storage),
        }
    return new_torch_file(named, start=start)


def _as_it_was(dcp: DcpFile, item: Item) -> list[Section]:
    path = dcp.folder / item.file
    refuse_code_in_stretch(path, item.offset, item.num_bytes)
    return [Section((Copy(path, item.offset, item.num_bytes),))]


def _retype(metadata: Made, items: Iterable[Item], state: StateTree, retyped: Mapping[str, StorageRef]) -> None:
    """Note the new element types of tensors in the metadata."""
    for item in items:
        value = below(state.tree, item.place) if item.place else None
        if isinstance(value, TensorRef) and value.storage.key in retyped:
            properties = metadata.states[0]["state_dict_metadata"][item.name].states[0]["properties"]
            dtype = retyped[value.storage.key].dtype
            properties.states[0] = (Name("torch", dtype.name), *properties.states[0][1:])


# --- sharding --------------------------------------------------------------------------------------------------------


def is_read_whole(origin: Snapshot) -> bool:
    """Whether what loads the checkpoint knows no shards: its trainer, or PEFT, which loads adapters."""
    weights = [part for part in origin.parts if part.role == "weights"]
    loads_shards = named(origin.layout).trainer.loads_shards
    return not loads_shards or any(part.path.name in ADAPTER_FILES or part.prefix for part in weights)


def _resharded(origin: Snapshot, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    """The weights in shards of a new size; everything else as it was."""
    files = [part.content for part in origin.parts if isinstance(part.content, SafetensorsFile)]
    if not files or origin.path.is_file() or is_read_whole(origin):
        raise never_in_shards(origin)
    stem = files[0].path.name.partition("-")[0].removesuffix(".safetensors")
    index = next((part.content for part in origin.parts if part.role == "weights-index"), None)
    tensors = [rewrite.planned(entry) for file in files for entry in file.entries]
    outputs = shards(stem, tensors, rewrite.max_shard_bytes or 0, _metadata(files[0], rewrite), index)
    others = [part for part in origin.parts if part.role not in {"weights", "weights-index"}]
    return outputs + [output for part in others for output in plan_part(part, advanced, rewrite)]


def never_in_shards(origin: Snapshot) -> UsageError:
    return UsageError(
        f"--max-shard-size: {origin.path.name} is a {origin.layout} checkpoint whose weights are never read in shards",
        hint="leave the option out",
    )


def shards(
    stem: str, tensors: Sequence[Planned], max_bytes: int, metadata: Mapping[str, str], index: object = None
) -> list[OutputFile]:
    """Safetensors files of at most so many bytes, named as transformers names them, and the index of several.

    Args:
        index: the index that they had before.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.num_bytes,
        get_storage_id=lambda _: None,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    outputs = [
        safetensors_output(name, [named[tensor] for tensor in inside], metadata)
        for name, inside in split.filename_to_tensors.items()
    ]
    if split.is_sharded:
        known = dict(index.get("metadata") or {}) if isinstance(index, dict) else {}
        whole = {"metadata": known | {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": split.tensor_to_filename}
        outputs.append(json_output(f"{stem}.safetensors.index.json", whole))
    return outputs
