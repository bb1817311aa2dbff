"""What output files are made of: pieces of the origin's files and of the forecast, in sections, and what a plan rewrites."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from farcast_cli.tensors import DTYPES, FLOATING, DType, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.choices import OutputDType
    from farcast_cli.state.advance import Change

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
class Joined:
    """Sections [first, end) of a file that are one record of a zip; their CRC-32 as one is written to `checksums_at`.

    Those of them that have no place for a checksum of their own are fixed bytes.
    """

    first: int
    end: int
    checksums_at: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OutputFile:
    """An output file; `name` is its path inside the checkpoint, "" where the checkpoint is that one file."""

    name: str
    sections: tuple[Section, ...]
    mode: int = 0o666
    """Its permissions, and those of the folders that are made for it, within the umask."""
    folder_mode: int = 0o777
    joined: tuple[Joined, ...] = ()

    @property
    def num_bytes(self) -> int:
        return sum(section.num_bytes for section in self.sections)


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
    """What the plan changes beside the weights: element type, shard size, BatchNorm's counts, metadata."""

    index_of: Mapping[str, int]
    dtype: OutputDType = "source"
    max_shard_bytes: int | None = None
    batch_counts: Mapping[str, Change] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of safetensors files that change, by key."""
    mirror: bool = False
    """Whether the forecast also takes the place of an average that users load."""
    mapped: Mapping[str, ValueMap] = field(default_factory=dict)
    """What becomes of the values of some tensors, by name."""
    masters: Mapping[str, tuple[TensorEntry, int]] = field(default_factory=dict)
    """Second copies of a higher precision, from which the weights of these names are rounded."""
    averages: Mapping[str, Mapping[str, tuple[TensorEntry, int]]] = field(default_factory=dict)
    """What becomes of averages in files of their own: by the file's part and its tensors, those that are forecast in their place."""

    def out_dtype(self, dtype: DType) -> DType:
        return DTYPES[self.dtype] if self.dtype != "source" and dtype.name in FLOATING else dtype

    def within(self, prefix: str) -> Rewrite:
        """The same for a file whose tensors the snapshot knows under a prefix, by the file's own names."""

        def own(named: Mapping[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}

        if not prefix:
            return self
        return replace(
            self,
            index_of=own(self.index_of),
            batch_counts=own(self.batch_counts),
            mapped=own(self.mapped),
            masters=own(self.masters),
        )

    def of_average(self, name: str) -> Rewrite:
        """The same for a part that holds an average of the weights, by the file's own names."""
        own = self.averages.get(name, {})
        return Rewrite({tensor: number for tensor, (_, number) in own.items()}, self.dtype, masters=own)

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
        if entry.name in self.masters:
            master, number = self.masters[entry.name]
            return (Values(master, number, dtype),)
        if index is None and dtype == entry.dtype:
            return (Copy(entry.path, entry.offset, entry.num_bytes),)
        real = entry.as_real()
        return (Values(real, index, dtype if real is entry else real.dtype, non_negative=entry.name.endswith("running_var")),)
