"""The safetensors header: parsed and checked in full, and written back, without reading the data.

Layout: 8 bytes little-endian header length n, n bytes of JSON, then the data section without holes.
Source: https://github.com/huggingface/safetensors#format

The headers of a run's snapshots are the same, their metadata aside. Such a header is parsed once, and its files share it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from math import prod
from operator import itemgetter
from typing import TYPE_CHECKING, Any, BinaryIO
from weakref import WeakValueDictionary

from farcast_cli.errors import FileFormatError, HalfWrittenError, SnapshotError
from farcast_cli.files.json_text import parse_json, refuse_huge
from farcast_cli.files.reading import file_size, read_bytes, refuse_lfs_pointer
from farcast_cli.tensors import BY_CODE, DTYPES, DType, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_NAME = 1_000  # characters of a tensor's name
MAX_DIMS = 64  # torch's own
ALIGNMENT = 8
_MAX_COUNT = 1 << 62
_LENGTH_BYTES = 8  # of the header length in front
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Header:
    """What a header says of K tensors, in the order of their data, which lie without holes; files of the same header share it."""

    names: tuple[str, ...]
    dtypes: tuple[DType, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]
    """K + 1 bytes of the data section: where each begins, and where the last one ends."""
    largest: int
    """The number of the first of those that take the most bytes; -1 where there is none."""


class StoredEntries(Sequence[TensorEntry]):
    """The tensors of one file, in the order of their data; made when they are first asked for."""

    __slots__ = ("_made", "data_start", "header", "path")

    def __init__(self, header: Header, path: Path, data_start: int) -> None:
        self.header, self.path, self.data_start = header, path, data_start
        self._made: tuple[TensorEntry, ...] | None = None

    def made(self) -> tuple[TensorEntry, ...]:
        """All of them."""
        if self._made is None:
            header = self.header
            offsets = map(self.data_start.__add__, header.bounds)
            self._made = tuple(map(TensorEntry, header.names, header.dtypes, header.shapes, repeat(self.path), offsets))
        return self._made

    @property
    def largest(self) -> TensorEntry | None:
        """The first of those that take the most bytes; alone, it costs no other."""
        header, number = self.header, self.header.largest
        if number < 0:
            return None
        offset = self.data_start + header.bounds[number]
        return TensorEntry(header.names[number], header.dtypes[number], header.shapes[number], self.path, offset)

    def __getitem__(self, number: Any) -> Any:
        return self.made()[number]

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.made())

    def __len__(self) -> int:
        return len(self.header.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredEntries) and self.made() == other.made()

    __hash__ = None  # type: ignore[assignment]  # as a dict's


class StoredTensors(Mapping[str, TensorEntry]):
    """The tensors of a snapshot's safetensors files by name. No two of them share a byte: a header is refused where they do."""

    __slots__ = ("_named", "files")

    def __init__(self, files: Sequence[StoredEntries]) -> None:
        self.files = tuple(files)
        self._named: dict[str, TensorEntry] | None = None

    @property
    def headers(self) -> tuple[Header, ...]:
        """Of its files: the same objects as another's where both have the same tensors in the same order."""
        return tuple(file.header for file in self.files)

    @property
    def largest(self) -> TensorEntry | None:
        """The first of those that take the most bytes."""
        found = (entry for file in self.files if (entry := file.largest))
        return max(found, key=lambda entry: entry.num_bytes, default=None)

    def made(self) -> dict[str, TensorEntry]:
        """All of them by name."""
        if self._named is None:
            self._named = {name: entry for file in self.files for name, entry in zip(file.header.names, file, strict=True)}
        return self._named

    def __getitem__(self, name: str) -> TensorEntry:
        return self.made()[name]

    def __iter__(self) -> Iterator[str]:
        return (name for file in self.files for name in file.header.names)

    def __len__(self) -> int:
        return sum(map(len, self.files))

    def __contains__(self, name: object) -> bool:
        return name in self.made()

    def values(self) -> Any:
        """In the order of the files; nothing is made by name for them."""
        return [entry for file in self.files for entry in file]

    def items(self) -> Any:
        """As a dict's."""
        return self.made().items()


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A parsed header: tensors in the order of their data, metadata, and where the data section starts."""

    path: Path
    entries: Sequence[TensorEntry]
    metadata: Mapping[str, str]
    data_start: int
    num_bytes: int
    digest: str


def read_safetensors(path: Path) -> SafetensorsFile:
    """Parse and check a file's header; costs one small read.

    Raises:
        HalfWrittenError: the file ends before its header or its data do, or holds zeros only.
        FileFormatError: LFS pointer, wrong lengths, bad JSON, duplicate names, overlaps, holes, trailing bytes.
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, 32))
    refuse_lfs_pointer(path, head)
    length = int.from_bytes(head[:8], "little")
    limit = min(size - _LENGTH_BYTES, MAX_HEADER_BYTES)
    if size < _LENGTH_BYTES or length > limit or head[8:9] != b"{":
        found = f"a header of {length} bytes" if size >= _LENGTH_BYTES else f"{size} bytes in all"
        what = f"no safetensors header: expected one of at most {max(limit, 0)} bytes, found {found}"
        raise _cut_short(path, what) if _ends_in_header(head, length) else _damaged(path, what)
    raw = read_bytes(path, 8, length)
    header, metadata = _header_of(path, raw)
    data_start = 8 + length
    end = data_start + header.bounds[-1]
    if end > size:
        raise _cut_short(path, f"expected {end} bytes, found {size}")
    if end < size:
        raise _damaged(path, f"expected {end} bytes, found {size}: there are bytes behind its data")
    digest = hashlib.sha256(raw).hexdigest()
    return SafetensorsFile(path, StoredEntries(header, path, data_start), metadata, data_start, size, digest)


def by_name(files: Sequence[SafetensorsFile], path: Path) -> Mapping[str, TensorEntry]:
    """All tensors of a snapshot's files by name.

    Raises:
        SnapshotError: two files have a tensor of the same name.
    """
    found = StoredTensors([file.entries for file in files if isinstance(file.entries, StoredEntries)])
    if len(files) > 1 and len(set(found)) < len(found):
        places: dict[str, Path] = {}
        for name, place in ((name, file.path) for file in found.files for name in file.header.names):
            if name in places:
                raise SnapshotError(f"{path}: tensor {name!r} is in two files, {places[name].name} and {place.name}")
            places[name] = place
    return found


def encode_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON for tensors whose data follow in the given order; padded so that the data start aligned."""
    parts = [f'"__metadata__":{_ENCODE(dict(sorted(metadata.items())))}'] if metadata else []
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + dtype.bytes_of(prod(shape))
        place = _ENCODE({"dtype": dtype.code, "shape": list(shape), "data_offsets": [begin, end]})
        parts.append(f"{_ENCODE(name)}:{place}")
        begin = end
    text = f"{{{','.join(parts)}}}".encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """A whole file of numpy arrays, in their order; each must be C-contiguous."""
    file.write(encode_header(((name, DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()), metadata))
    file.writelines(array.data for array in arrays.values())


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint="the file is damaged or incomplete: save or download it again")


def _cut_short(path: Path, what: str) -> HalfWrittenError:
    return HalfWrittenError(f"{path}: {what}", hint="the file is incomplete or truncated: save or download it again")


def _ends_in_header(head: bytes, length: int) -> bool:
    """Whether a file that has no whole header is the beginning of one, or zeros that a crash left."""
    return len(head) <= _LENGTH_BYTES or not any(head) or (head[8:9] == b"{" and length <= MAX_HEADER_BYTES)


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


_METADATA = re.compile(rb'\{"__metadata__": *+(\{(?:[^"{}]|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+\}), *+(?=")', re.DOTALL)
"""The beginning of most headers: metadata with no object inside, and a tensor behind it."""
_KNOWN: WeakValueDictionary[bytes, Header] = WeakValueDictionary()
"""The headers that some file in memory has, by the digest of their text behind the metadata."""


def _header_of(path: Path, raw: bytes) -> tuple[Header, dict[str, str]]:
    """What a header says; if its text behind the metadata was parsed and checked before, only the metadata is now."""
    found = _METADATA.match(raw)
    behind = hashlib.sha256(memoryview(raw.rstrip(b" "))[found.end() if found else 0 :]).digest()
    known = _KNOWN.get(behind)
    if known is not None:
        text = b" " * found.start(1) + found[1] if found else b"{}"  # where it lies in the header, as an error says
        return known, _metadata(path, _parse(path, text, whole=raw))
    specs = _parse(path, raw, whole=raw)
    has_metadata = "__metadata__" in specs
    metadata = _metadata(path, specs.pop("__metadata__", {}))
    header = _checked(path, specs)
    if found or not has_metadata:  # else it stands elsewhere, and its text is not behind it
        _KNOWN[behind] = header
    return header, metadata


def _parse(path: Path, raw: bytes, *, whole: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _damaged(path, "the header names a tensor twice")
        return found

    try:
        refuse_huge(whole)
        header = parse_json(raw, made_of=unique)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    if b"\\u" in raw and _LONE_SURROGATE.search(json.dumps(header, ensure_ascii=False)):
        raise _damaged(path, "the header is not JSON: half of a surrogate pair")  # Python reads it, others do not
    return header


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(path, "__metadata__ is not a map of strings")
    return value


def _checked(path: Path, specs: Mapping[str, Any]) -> Header:
    """The tensors of a header in the order of their data.

    Raises:
        FileFormatError: a wrong name, dtype, shape or place, an overlap, or a hole.
    """
    names: list[str] = []
    dtypes: list[DType] = []
    shapes: list[tuple[int, ...]] = []
    bounds, largest, most = [0], -1, -1
    for begin, end, name, dtype, shape in sorted(
        (_checked_spec(path, name, spec) for name, spec in specs.items()), key=itemgetter(0, 1)
    ):
        if begin != bounds[-1]:
            raise _damaged(path, f"tensor {name!r} starts at byte {begin} of the data, expected {bounds[-1]}")
        if end - begin > most:
            largest, most = len(names), end - begin
        names.append(name)
        dtypes.append(dtype)
        shapes.append(shape)
        bounds.append(end)
    return Header(tuple(names), tuple(dtypes), tuple(shapes), tuple(bounds), largest)


def _checked_spec(path: Path, name: str, spec: object) -> tuple[int, int, str, DType, tuple[int, ...]]:
    """Where a tensor's data begin and end in the data section, its name, its type and its shape."""
    if not name.isprintable() or len(name) > MAX_NAME:  # halves of a surrogate pair are not printable either
        raise _damaged(
            path, f"a tensor's name is {name[:MAX_NAME]!r}, expected printable text of at most {MAX_NAME} characters"
        )
    if not isinstance(spec, dict) or not {"dtype", "shape", "data_offsets"} <= spec.keys():
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    shape, offsets = spec["shape"], spec["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(n) is int and 0 <= n < _MAX_COUNT for n in numbers) or len(offsets) != 2 or len(shape) > MAX_DIMS:  # noqa: PLR2004
        raise _damaged(path, f"tensor {name!r} has shape {shape} and data_offsets {offsets}")
    dtype = BY_CODE.get(spec["dtype"]) if isinstance(spec["dtype"], str) else None
    if dtype is None:
        raise FileFormatError(f"{path}: tensor {name!r} has the unknown dtype {spec['dtype']!r}")
    num_elements = prod(shape)
    if num_elements * dtype.bits % 8:
        raise _damaged(path, f"tensor {name!r}: {num_elements} elements of {dtype.bits} bits fill no whole bytes")
    expected, found = dtype.bytes_of(num_elements), offsets[1] - offsets[0]
    if found != expected:
        raise _damaged(path, f"tensor {name!r}: expected {expected} bytes of data, found {found}")
    return offsets[0], offsets[1], sys.intern(name), dtype, tuple(shape)
