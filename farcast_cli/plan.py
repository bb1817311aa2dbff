"""What the forecast checkpoint's files will hold: the origin's own files with stretches of bytes replaced.

A plan is made from headers alone and says for every output file, record by record, where its bytes come from. The
same tensors under the same names, in the same files, in the same order: whatever read the origin reads the forecast.
"""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from farcast_cli.errors import UsageError
from farcast_cli.formats.files import file_size
from farcast_cli.formats.safetensors_file import SafetensorsFile, encode_header
from farcast_cli.formats.torch_file import TorchFile, refuse_code_in
from farcast_cli.formats.torch_pickle import StorageRef, encode_pickle, iter_tensors
from farcast_cli.formats.torch_zip import frame
from farcast_cli.layouts.base import Part, Snapshot, find_step_in_name
from farcast_cli.layouts.loose_safetensors import STEP_KEYS
from farcast_cli.resume import Advanced, Change, StateTree, storages_of
from farcast_cli.tensors import DTYPES, FLOATING, DType, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

OutputDType = Literal["source", "float32", "bfloat16", "float16"]
_PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
"""Endings of files that their trainer may unpickle."""


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
class Record:
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
    records: tuple[Record, ...]

    @property
    def num_bytes(self) -> int:
        return sum(record.num_bytes for record in self.records)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the plan changes beside the weights: element type, shard size, BatchNorm's counts, the valid step."""

    index_of: Mapping[str, int]
    dtype: OutputDType = "source"
    max_shard_bytes: int | None = None
    batch_counts: Mapping[str, Change] = field(default_factory=dict)
    valid_step: int = 0

    def out_dtype(self, dtype: DType) -> DType:
        return DTYPES[self.dtype] if self.dtype != "source" and dtype.name in FLOATING else dtype

    def pieces(self, entry: TensorEntry) -> tuple[Piece, ...]:
        """Where a tensor's bytes come from."""
        if entry.name in self.batch_counts:
            return (Fixed(struct.pack("<q", int(self.batch_counts[entry.name].new))),)
        index, dtype = self.index_of.get(entry.name), self.out_dtype(entry.dtype)
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
    return [output for part in origin.parts if (output := _plan_part(part, advanced, rewrite)) is not None]


def _plan_part(part: Part, advanced: Advanced, rewrite: Rewrite) -> OutputFile | None:
    if part.name in advanced.dropped:
        return None
    if part.name in advanced.trees:
        state = advanced.trees[part.name]
        return _torch_output(state, rewrite) if state.file else _json_output(part.name, state.tree)
    if isinstance(part.content, SafetensorsFile):
        return _safetensors_output(part.name, part.content.entries, _metadata(part.content, rewrite), rewrite)
    if isinstance(part.content, TorchFile):
        return _torch_output(StateTree(part, copy.deepcopy(part.content.tree), part.content), rewrite)
    if part.role == "weights-index" and rewrite.dtype != "source":
        raise UsageError(f"--dtype {rewrite.dtype} changes the shards' sizes", hint="add --max-shard-size 5GB")
    if part.path.suffix in _PICKLED:
        refuse_code_in(part.path)
    return OutputFile(part.name, (Record((Copy(part.path, 0, file_size(part.path)),)),))


def _json_output(name: str, tree: Any) -> OutputFile:
    text = json.dumps(tree, indent=2, sort_keys=True) + "\n"  # as the Trainer writes it
    return OutputFile(name, (Record((Fixed(text.encode()),)),))


def _metadata(file: SafetensorsFile, rewrite: Rewrite) -> dict[str, str]:
    metadata = dict(file.metadata)
    return metadata | {key: str(rewrite.valid_step) for key in STEP_KEYS if key in metadata}


def _safetensors_output(name: str, entries: Iterable[TensorEntry], metadata: Mapping[str, str], rewrite: Rewrite) -> OutputFile:
    listed = list(entries)
    header = encode_header(((e.name, rewrite.out_dtype(e.dtype), e.shape) for e in listed), metadata)
    pieces = [piece for entry in listed for piece in rewrite.pieces(entry)]
    return OutputFile(name, (Record((Fixed(header), *pieces)),))


# --- torch files -----------------------------------------------------------------------------------------------------


def _torch_output(state: StateTree, rewrite: Rewrite) -> OutputFile:
    """A torch file with a new pickle; its storages as they were, but for what is forecast, moved on or retyped."""
    file = state.file
    assert file is not None  # noqa: S101 - the caller's branch
    weights = _weights_tree(state) if state.part.role in {"weights", "state"} else {}
    overlays = _overlays(file, weights, rewrite)
    retyped = {
        ref.storage.key: replace(ref.storage, dtype=rewrite.out_dtype(ref.storage.dtype)) for _, ref in iter_tensors(weights)
    }
    named: dict[str, tuple[Piece, ...]] = {f"{file.prefix}/data.pkl": (Fixed(encode_pickle(state.tree, retyped)),)}
    named |= {
        name: (Copy(file.path, record.offset, record.num_bytes),)
        for name, record in file.records.items()
        if not name.startswith(f"{file.prefix}/data/") and name not in named
    }
    for storage in storages_of(state.tree):
        dtype = retyped.get(storage.key, storage).dtype
        overlay = overlays.get(storage.key, [])
        named[f"{file.prefix}/data/{storage.key}"] = _storage_pieces(state, storage, dtype, overlay)
    return OutputFile(state.part.name, tuple(zip_records(named)))


def zip_records(named: Mapping[str, tuple[Piece, ...]], *, start: int = 0) -> Iterator[Record]:
    """A zip of named records that begins at byte `start` of its file."""
    framed = frame([(name, sum(piece.num_bytes for piece in pieces)) for name, pieces in named.items()])
    for head, pieces, places in zip(framed.heads, named.values(), framed.checksums_at, strict=True):
        yield Record((Fixed(head),))
        yield Record(pieces, tuple(start + place for place in places))
    yield Record((Fixed(framed.tail),))


def _weights_tree(state: StateTree) -> Any:
    tree = state.tree
    for key in state.part.weights_key:
        tree = tree[key]
    return tree


def _overlays(file: TorchFile, weights: Any, rewrite: Rewrite) -> dict[str, list[tuple[int, int, Piece]]]:
    """Replaced stretches of each storage: (first element, elements, piece)."""
    found: dict[str, list[tuple[int, int, Piece]]] = {}
    for keys, ref in iter_tensors(weights):
        entry = file.entry(".".join(map(str, keys)), ref)
        if entry.name in rewrite.index_of or entry.name in rewrite.batch_counts:
            (piece,) = rewrite.pieces(entry)
            found.setdefault(ref.storage.key, []).append((ref.offset, entry.num_elements, piece))
    return found


def _storage_pieces(
    state: StateTree, storage: StorageRef, dtype: DType, overlays: Sequence[tuple[int, int, Piece]]
) -> tuple[Piece, ...]:
    """A storage's elements: the origin's, with the overlays in their places."""
    moved = [(first, count, Fixed(data)) for (key, first, count), data in state.literals.items() if key == storage.key]
    zeroed = [
        (first, count, Zeros(count * dtype.itemsize)) for key, first, count in state.zeroed if key == storage.key and count
    ]
    pieces: list[Piece] = []
    position = 0
    for first, count, piece in sorted((*overlays, *moved, *zeroed), key=lambda overlay: overlay[:2]):
        if first < position:
            continue  # a second name for the same elements
        if first > position:
            pieces.append(_origins(state, storage, dtype, position, first))
        pieces.append(piece)
        position = first + count
    if position < storage.size:
        pieces.append(_origins(state, storage, dtype, position, storage.size))
    return tuple(pieces)


def _origins(state: StateTree, storage: StorageRef, dtype: DType, begin: int, end: int) -> Piece:
    """Elements [begin, end) of a storage as the origin has them."""
    assert state.file is not None  # noqa: S101
    record = state.file.storage_record(storage)
    place = record.offset + begin * storage.dtype.itemsize
    if dtype == storage.dtype:
        return Copy(record.path, place, (end - begin) * storage.dtype.itemsize)
    return Values(TensorEntry("", storage.dtype, (end - begin,), record.path, place), None, dtype)


# --- sharding --------------------------------------------------------------------------------------------------------


def _resharded(origin: Snapshot, advanced: Advanced, rewrite: Rewrite) -> list[OutputFile]:
    """The weights in shards of a new size, named as transformers names them; everything else as it was."""
    from huggingface_hub import split_state_dict_into_shards_factory

    files = [part.content for part in origin.parts if isinstance(part.content, SafetensorsFile)]
    if not files or origin.path.is_file():
        raise UsageError(
            f"--max-shard-size: {origin.path.name} is a {origin.layout} checkpoint, which has no shards",
            hint="leave the option out",
        )
    entries = {entry.name: entry for file in files for entry in file.entries}
    sizes = {name: rewrite.out_dtype(e.dtype).bytes_of(e.num_elements) for name, e in entries.items()}
    stem = files[0].path.name.partition("-")[0].removesuffix(".safetensors")
    split = split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: sizes[entry.name],
        get_storage_id=lambda _: None,
        filename_pattern=stem + "{suffix}.safetensors",
        max_shard_size=rewrite.max_shard_bytes or 0,
    )
    metadata = _metadata(files[0], rewrite)
    outputs = [
        _safetensors_output(name, [entries[tensor] for tensor in tensors], metadata, rewrite)
        for name, tensors in split.filename_to_tensors.items()
    ]
    if split.is_sharded:
        before = next((part.content for part in origin.parts if part.role == "weights-index"), None)
        known = dict(before.get("metadata") or {}) if isinstance(before, dict) else {}
        index = {"metadata": known | {"total_size": sum(sizes.values())}, "weight_map": split.tensor_to_filename}
        outputs.append(_json_output(f"{stem}.safetensors.index.json", index))
    others = [part for part in origin.parts if part.role not in {"weights", "weights-index"}]
    return outputs + [output for part in others if (output := _plan_part(part, advanced, rewrite)) is not None]
