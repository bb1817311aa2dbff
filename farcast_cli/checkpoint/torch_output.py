"""Torch files as outputs: a pickle and the storages of its tensors, from the origin's records and from what is forecast."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from farcast_cli.checkpoint.pieces import Copy, Fixed, OutputFile, Piece, Planned, Rewrite, Section, Values, Zeros
from farcast_cli.errors import UsageError
from farcast_cli.formats.pickled_module import is_module
from farcast_cli.formats.torch_pickle import UNTYPED, StorageRef, TensorRef, encode_pickle, is_streamable, iter_tensors
from farcast_cli.formats.torch_zip import frame
from farcast_cli.formats.tree import dotted, find
from farcast_cli.state.advance import StateTree, storages_of
from farcast_cli.tensors import DTYPES, FLOATING, DType, TensorEntry, row_major_strides

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from farcast_cli.formats.torch_file import TorchFile
    from farcast_cli.trainers.base import Role

WITH_WEIGHTS: frozenset[Role] = frozenset({"weights", "twin", "average", "state"})
"""The roles of files that hold weights, or averages of them."""


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
    weights = state.part.weights_in(state.tree) if state.part.role in WITH_WEIGHTS else {}
    twins = _twins(state) if rewrite.mirror else {}
    refs = (ref for refs in ((ref for _, ref in iter_tensors(weights)), *twins.values()) for ref in refs)
    retyped = {ref.storage.key: replace(ref.storage, dtype=rewrite.out_dtype(ref.storage.dtype)) for ref in refs}
    overlays = _overlays(state.file, weights, rewrite, twins)
    for (key, first, count), (entry, index) in state.forecast.items():
        overlays.setdefault(key, []).append((first, count, Values(entry, index, entry.dtype)))
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
    named = torch_records(
        file, _pickle_of(state, storages), {one.key: storages.pieces(state, one) for one in storages_of(state.tree)}
    )
    return OutputFile(state.part.name, tuple(zip_records(named)))


def torch_records(file: TorchFile, pickled: Piece, held: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
    """The records of a torch file with a new pickle and new storages (by key); its other records as they were."""
    named: dict[str, tuple[Piece, ...]] = {f"{file.prefix}/data.pkl": (pickled,)}
    named |= {
        name: (Copy(file.path, record.offset, record.num_bytes),)
        for name, record in file.records.items()
        if not name.startswith(f"{file.prefix}/data/") and name not in named
    }
    return named | {f"{file.prefix}/data/{key}": pieces for key, pieces in held.items()}


def _pickle_of(state: StateTree, storages: Storages) -> Piece:
    """The file's pickle; the origin's own bytes if a module was pickled and nothing in the pickle changes."""
    file = state.file
    assert file is not None  # noqa: S101 - the caller's branch
    new = encode_pickle(state.tree, storages.retyped)
    if any(is_module(find(file.tree, one.path)) for one in state.part.networks) and new == encode_pickle(file.tree):
        record = file.records[f"{file.prefix}/data.pkl"]
        return Copy(file.path, record.offset, record.num_bytes)
    return Fixed(new)


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


def _twins(state: StateTree) -> dict[str, list[TensorRef]]:
    """The tensors of averages by the names of their weights."""
    found: dict[str, list[TensorRef]] = {}
    for ref, name in (pair for average in state.part.averages for pair in average.pairs):
        found.setdefault(name, []).append(ref)
    return found


def _overlays(
    file: TorchFile, weights: Any, rewrite: Rewrite, twins: Mapping[str, Sequence[TensorRef]]
) -> dict[str, list[tuple[int, int, Piece]]]:
    """Replaced stretches of each storage: (first element, elements, piece).

    Args:
        twins: tensors that get the forecast of the weights of these names.
    """
    found: dict[str, list[tuple[int, int, Piece]]] = {}
    for keys, ref in iter_tensors(weights):
        entry = file.entry(dotted(keys), ref)
        if any(entry.name in named for named in (rewrite.index_of, rewrite.batch_counts, rewrite.mapped)):
            (piece,) = rewrite.pieces(entry)
            found.setdefault(ref.storage.key, []).append((ref.offset, entry.num_elements, piece))
            for twin in twins.get(entry.name, ()):
                if is_streamable(twin) and twin.stride == ref.stride:
                    found.setdefault(twin.storage.key, []).append((twin.offset, entry.num_elements, _for(twin, piece, rewrite)))
    return found


def _for(twin: TensorRef, piece: Piece, rewrite: Rewrite) -> Piece:
    """A weight's piece in the type of its average, which may be another."""
    if not isinstance(piece, Values) or twin.dtype.name not in FLOATING:
        return piece
    return replace(piece, dtype=rewrite.out_dtype(twin.dtype))


def _origins(state: StateTree, storage: StorageRef, dtype: DType, begin: int, end: int) -> Piece:
    """Elements [begin, end) of a storage as the origin has them."""
    assert state.file is not None  # noqa: S101
    record = state.file.storage_record(storage)
    place = record.offset + begin * storage.dtype.itemsize
    if dtype == storage.dtype:
        return Copy(record.path, place, (end - begin) * storage.dtype.itemsize)
    return Values(TensorEntry("", storage.dtype, (end - begin,), record.path, place), None, dtype)


def ref_of(tensor: Planned, key: str) -> TensorRef:
    """A tensor as a torch file has it, alone in a storage."""
    if tensor.dtype.name not in DTYPES:
        raise UsageError(f"tensor {tensor.name!r} is {tensor.dtype.name}, which torch cannot hold", hint="leave --layout out")
    strides = tensor.strides or row_major_strides(tensor.shape)
    is_typed = bool(tensor.dtype.storage)
    size = prod(tensor.shape) if is_typed else tensor.num_bytes
    storage = StorageRef(key, tensor.dtype if is_typed else UNTYPED, "cpu", size)
    return TensorRef(storage, tensor.dtype, 0, tensor.shape, strides)
