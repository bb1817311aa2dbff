"""The safetensors header: parsed and checked in full, and written back, without reading the data.

Layout: 8 bytes little-endian header length n, n bytes of JSON, then the data section without holes.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from farcast_cli.errors import FileFormatError, HalfWrittenError
from farcast_cli.files.json_text import parse_json
from farcast_cli.files.reading import file_size, read_bytes, refuse_lfs_pointer
from farcast_cli.tensors import BY_CODE, DTYPES, DType, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_NAME = 1_000  # characters of a tensor's name
MAX_DIMS = 64  # torch's own
ALIGNMENT = 8
_MAX_COUNT = 1 << 62
_LENGTH_BYTES = 8  # of the header length in front


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A parsed header: tensors in the order of their data, metadata, and where the data section starts."""

    path: Path
    entries: tuple[TensorEntry, ...]
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
    header = _parse(path, raw)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    data_start = 8 + length
    entries = sorted((_entry(path, name, spec, data_start) for name, spec in header.items()), key=_position)
    _check_gapless(path, entries, data_start, size)
    digest = hashlib.sha256(raw).hexdigest()
    return SafetensorsFile(path, tuple(entries), metadata, data_start, size, digest)


def encode_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON for tensors whose data follow in the given order; padded so that the data start aligned."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + dtype.bytes_of(prod(shape))
        header[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_arrays(file: BinaryIO, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """A whole file of numpy arrays, in their order; each must be C-contiguous."""
    file.write(encode_header(((name, DTYPES[array.dtype.name], array.shape) for name, array in arrays.items()), metadata))
    file.writelines(array.data for array in arrays.values())


def _position(entry: TensorEntry) -> tuple[int, int]:
    return entry.offset, entry.num_bytes


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint="the file is damaged or incomplete: save or download it again")


def _cut_short(path: Path, what: str) -> HalfWrittenError:
    return HalfWrittenError(f"{path}: {what}", hint="the file is incomplete or truncated: save or download it again")


def _ends_in_header(head: bytes, length: int) -> bool:
    """Whether a file that has no whole header is the beginning of one, or zeros that a crash left."""
    return len(head) <= _LENGTH_BYTES or not any(head) or (head[8:9] == b"{" and length <= MAX_HEADER_BYTES)


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _damaged(path, "the header names a tensor twice")
        return found

    try:
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


def _entry(path: Path, name: str, spec: object, data_start: int) -> TensorEntry:
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
    return TensorEntry(sys.intern(name), dtype, tuple(shape), path, data_start + offsets[0])


def _check_gapless(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    position = data_start
    for entry in entries:
        if entry.offset != position:
            raise _damaged(path, f"tensor {entry.name!r} starts at byte {entry.offset}, expected {position}")
        position += entry.num_bytes
    if position > size:
        raise _cut_short(path, f"expected {position} bytes, found {size}")
    if position < size:
        raise _damaged(path, f"expected {position} bytes, found {size}: there are bytes behind its data")
