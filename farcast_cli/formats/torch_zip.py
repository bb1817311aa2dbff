"""A torch file's frame: the zip headers around its records, known before a byte of the data is.

Every record is stored plainly and starts at a multiple of 64 bytes, as torch maps them. A record's checksum is not known
before its data are: the frame says where in the file it belongs, and it is filled in last.

Source: PKWARE's APPNOTE, 4.3 and 4.5.3; torch/csrc (caffe2/serialize/inline_container.cc) for names and alignment.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ALIGNMENT = 64  # torch.save's own
_LARGE = 0xFFFFFFFF  # of 32-bit fields: look into the zip64 field
_MANY = 0xFFFF
_DATE = 0x0021  # 1 January 1980
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_CHECKSUM_IN_LOCAL, _CHECKSUM_IN_CENTRAL = 14, 16  # byte offsets in the two headers


@dataclass(frozen=True, slots=True)
class Frame:
    """The bytes before each record, those after the last, and where each record's checksum belongs.

    Positions count from the start of the zip.
    """

    heads: tuple[bytes, ...]
    tail: bytes
    checksums_at: tuple[tuple[int, int], ...]


def frame(records: Sequence[tuple[str, int]]) -> Frame:
    """The frame of records (name, bytes) in order."""
    position = 0
    heads, central, places = [], [], []
    for name, num_bytes in records:
        heads.append(_local_header(name, num_bytes, position))
        places.append(position)
        central.append(_central_header(name, num_bytes, position))
        position += len(heads[-1]) + num_bytes
    tail = b"".join(central) + _end_record(len(records), sum(map(len, central)), position)
    in_tail = _starts(position, map(len, central))
    checksums = ((a + _CHECKSUM_IN_LOCAL, b + _CHECKSUM_IN_CENTRAL) for a, b in zip(places, in_tail, strict=True))
    return Frame(tuple(heads), tail, tuple(checksums))


def _starts(first: int, sizes: Iterable[int]) -> list[int]:
    found = []
    for size in sizes:
        found.append(first)
        first += size
    return found


def _zip64(*values: int) -> bytes:
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""


def _local_header(name: str, num_bytes: int, position: int) -> bytes:
    """A record's header, padded so that its data start aligned."""
    large = num_bytes >= _LARGE
    extra = _zip64(num_bytes, num_bytes) if large else b""
    size = _LARGE if large else num_bytes
    start = position + _LOCAL.size + len(name.encode()) + len(extra) + 4
    padding = -start % ALIGNMENT
    extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    fields = (b"PK\x03\x04", 45 if large else 20, 0x800, 0, 0, _DATE, 0, size, size, len(name.encode()), len(extra))
    return _LOCAL.pack(*fields) + name.encode() + extra


def _central_header(name: str, num_bytes: int, position: int) -> bytes:
    large, far = num_bytes >= _LARGE, position >= _LARGE
    extra = _zip64(*((num_bytes, num_bytes) if large else ()), *((position,) if far else ()))
    size, place = _LARGE if large else num_bytes, _LARGE if far else position
    version = 45 if large or far else 20
    names = len(name.encode()), len(extra), 0
    fields = (b"PK\x01\x02", version, version, 0x800, 0, 0, _DATE, 0, size, size, *names, 0, 0, 0, place)
    return _CENTRAL.pack(*fields) + name.encode() + extra


def _end_record(count: int, num_bytes: int, position: int) -> bytes:
    plain = count < _MANY and position < _LARGE and num_bytes < _LARGE
    end = _END.pack(b"PK\x05\x06", 0, 0, *[min(count, _MANY)] * 2, min(num_bytes, _LARGE), min(position, _LARGE), 0)
    if plain:
        return end
    end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, num_bytes, position)
    return end64 + _LOCATOR.pack(b"PK\x06\x07", 0, position + num_bytes, 1) + end
