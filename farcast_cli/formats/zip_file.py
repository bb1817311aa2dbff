"""A zip's records: where their bytes lie, found within limits and told alike to every reader.

The one place that opens zips. A directory of a million records takes Python half a GB, and two readers may see two
lists of records in one file: both are refused here.

Source: PKWARE's APPNOTE, 4.3.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.files.reading import fetch, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from _typeshed import WriteableBuffer

MAX_DIRECTORY_BYTES = 1 << 24  # 16 MiB, some 200,000 records: at most 150 MB of memory
ZIP_MARK = b"PK\x03\x04"
SAVE_AGAIN = "the file is damaged or incomplete: save or download it again"
_SMALL_BYTES = 1 << 16  # a stretch that is read whole: an item of a distributed checkpoint takes a dozen looks
_LOCAL_BYTES = 30  # of a record's header, before its name
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56


@dataclass(frozen=True, slots=True)
class ZipMember:
    """Where a zip record's bytes lie."""

    path: Path
    name: str
    offset: int
    num_bytes: int


def damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint=SAVE_AGAIN)


class Span:
    """A stretch of a file, which begins at 0 for whoever reads it. A small one is read once, however many ask for it."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.path, self.start, self.size = path, start, size
        self._data = read_bytes(path, start, size) if size <= _SMALL_BYTES else None

    def read(self, offset: int, count: int) -> bytes:
        if self._data is not None and 0 <= offset <= offset + count <= self.size:
            return self._data[offset : offset + count]
        return read_bytes(self.path, self.start + offset, count)

    def read_record(self, record: ZipMember, most: int | None = None) -> bytes:
        count = record.num_bytes if most is None else min(record.num_bytes, most)
        return self.read(record.offset - self.start, count)


class Window(io.RawIOBase):
    """A stretch of a file as a file of its own, for zipfile to read."""

    def __init__(self, stretch: Span) -> None:
        super().__init__()
        self._stretch, self._size, self._position = stretch, stretch.size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a negative position")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self._size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        if count > MAX_DIRECTORY_BYTES:
            raise UnsafeFileError(
                f"{self._stretch.path}: a zip directory of {count} bytes, over the limit of {MAX_DIRECTORY_BYTES}",
                hint="keep the file out of this folder, or save it with fewer records",
            )
        data = self._stretch.read(self._position, count)
        self._position += count
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(min(len(view), MAX_DIRECTORY_BYTES))
        view[: len(data)] = data
        return len(data)


def directory(stretch: Span) -> list[zipfile.ZipInfo]:
    """A zip's own list of its records, where no other reader can see another list."""
    try:
        with zipfile.ZipFile(Window(stretch)) as archive:
            infos, begin = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, UnicodeDecodeError) as error:
        raise HalfWrittenError(f"{stretch.path}: not a whole zip file: {error}", hint=SAVE_AGAIN) from error
    if begin not in _told_directories(stretch):
        raise damaged(stretch.path, "its directory of records is not where its end says")
    fetch((stretch.path, stretch.start + info.header_offset, _LOCAL_BYTES) for info in infos)
    return infos


def _told_directories(stretch: Span) -> set[int]:
    """Where the end of a zip says that its directory begins; nothing where its two ends say different things."""
    behind = stretch.size - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES
    tail = stretch.read(max(behind, 0), stretch.size - max(behind, 0))
    end, locator = tail[-_END_BYTES:], tail[-_END_BYTES - _LOCATOR_BYTES : -_END_BYTES]
    if end[:4] != b"PK\x05\x06":
        return set()
    if locator[:4] != b"PK\x06\x07":
        return {int.from_bytes(end[16:20], "little")}
    told = int.from_bytes(locator[8:16], "little") == behind and tail[:4] == b"PK\x06\x06"
    return {int.from_bytes(tail[48:56], "little")} if told else set()


def plain_record(stretch: Span, info: zipfile.ZipInfo) -> ZipMember:
    name = info.orig_filename
    if not name.isprintable() or "\\" in name or {"", ".."} & set(name.rstrip("/").split("/")):
        raise UnsafeFileError(f"{stretch.path}: a record is called {name!r}", hint=SAVE_AGAIN)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise UnsafeFileError(
            f"{stretch.path}: record {name!r} is compressed or encrypted; torch stores plainly",
            hint="load and save it again with torch, or keep the file out of this folder",
        )
    return ZipMember(stretch.path, name, stretch.start + data_offset(stretch, info), info.file_size)


def data_offset(stretch: Span, info: zipfile.ZipInfo) -> int:
    if info.header_offset + _LOCAL_BYTES > stretch.size:
        raise damaged(stretch.path, f"record {info.filename!r} reaches beyond the end of the file")
    local = stretch.read(info.header_offset, _LOCAL_BYTES)
    if local[:4] != ZIP_MARK:
        raise damaged(stretch.path, f"record {info.filename!r} has no header")
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    offset = info.header_offset + _LOCAL_BYTES + name_length + extra_length
    if offset + info.compress_size > stretch.size:
        raise damaged(stretch.path, f"record {info.filename!r} reaches beyond the end of the file")
    return offset


def refuse_overlap(path: Path, records: Iterable[ZipMember]) -> None:
    """Refuse records that share bytes: a small zip could have any number of large ones."""
    end, last = 0, ""
    for record in sorted(records, key=lambda record: record.offset):
        if record.offset < end:
            raise damaged(path, f"records {last!r} and {record.name!r} overlap")
        end, last = record.offset + record.num_bytes, record.name
