"""What `torch.save` writes: a zip of one pickle and one record of raw bytes per storage.

Knows where the bytes of every tensor lie, having checked that they lie inside their records and the records inside
the file. No tensor is loaded; torch_pickle.py says what becomes of the pickle.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shlex
import tarfile
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.formats.files import file_size, open_read_only, read_bytes, refuse_lfs_pointer
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, decode_pickle, iter_storages, refuse_code, unsafe
from farcast_cli.tensors import TensorEntry, is_row_major

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_PICKLE_BYTES = 1 << 28  # 256 MiB: names and numbers only, a million tensors take less
MAX_DIRECTORY_BYTES = 1 << 25  # of a zip: some 400,000 records
_ZIP_MARK = b"PK\x03\x04"
_SAVE_AGAIN = "the file is damaged or half-written: save or download it again"
_SMALL_BYTES = 1 << 16  # a stretch that is read whole: an item of a distributed checkpoint takes a dozen looks
_LOCAL_BYTES = 30  # of a record's header, before its name
_PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"}
"""Endings of files that their trainer may unpickle; protocols 0 and 1 tell themselves by nothing else."""
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56


@dataclass(frozen=True, slots=True)
class Record:
    """Where a zip record's bytes lie."""

    path: Path
    name: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A torch file's object tree and records. The tree belongs to the reader, who may edit it."""

    path: Path
    tree: Any
    records: Mapping[str, Record]
    prefix: str
    num_bytes: int
    digest: str

    def storage_record(self, storage: StorageRef) -> Record:
        return self.records[f"{self.prefix}/data/{storage.key}"]

    def entry(self, name: str, ref: TensorRef) -> TensorEntry:
        """The tensor's place in the file."""
        record = self.storage_record(ref.storage)
        offset = record.offset + ref.offset * ref.dtype.itemsize
        strides = () if is_row_major(ref.shape, ref.stride) else ref.stride
        return TensorEntry(name, ref.dtype, ref.shape, record.path, offset, strides)


def below(tree: Any, keys: tuple[Any, ...]) -> Any:
    """What these keys lead to in a tree."""
    for key in keys:
        tree = tree[key]
    return tree


def read_torch_file(path: Path) -> TorchFile:
    """Read a torch file's object tree; costs its directory and its pickle, no tensor data.

    Raises:
        UnsafeFileError: the pickle names something that is no data.
        FileFormatError: not a torch zip file, damaged, compressed, big-endian, or records that do not fit.
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, 32))
    refuse_lfs_pointer(path, head)
    if not head.startswith(_ZIP_MARK):
        raise _not_a_zip(path, head)
    return read_torch_stretch(path, 0, size)


def read_torch_stretch(path: Path, start: int, size: int) -> TorchFile:
    """The same for a torch file that is the stretch [start, start + size) of another."""
    stretch = _Stretch(path, start, size)
    records = _read_records(stretch)
    pickled = _pickle_record(path, records)
    prefix = pickled.name.removesuffix("/data.pkl")
    _check_byte_order(stretch, records.get(f"{prefix}/byteorder"))
    raw = stretch.read_record(pickled)
    file = TorchFile(
        path, decode_pickle(path, raw, num_records=len(records)), records, prefix, size, hashlib.sha256(raw).hexdigest()
    )
    try:
        for ref in iter_storages(file.tree):
            _check_ref(file, ref)
    except UnsafeFileError as error:
        raise unsafe(path, error) from error
    return file


def refuse_code_in(path: Path) -> None:
    """Refuse a file that would run code where it is loaded, a torch file or a bare pickle; anything else passes.

    Raises:
        UnsafeFileError: it names a function of the system's, or hides what it names.
        FileFormatError: it is a zip that is not whole.
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, len(_ZIP_MARK)))
    is_expected = path.suffix.lower() in _PICKLED
    if head == _ZIP_MARK:
        try:
            refuse_code_in_stretch(path, 0, size)
        except FileFormatError as error:
            if is_expected or isinstance(error, UnsafeFileError):
                raise
        return
    if not is_expected and head[:1] != pickle.PROTO:
        return
    with os.fdopen(open_read_only(path), "rb") as stream:
        if _is_tar(stream):
            raise UnsafeFileError(f"{path}: a torch file from before torch 0.2, whose pickles cannot be looked into")
        refuse_code(path, stream)


def refuse_code_in_stretch(path: Path, start: int, size: int) -> None:
    """The same for a zip that is a stretch of a file.

    TorchScript has several pickles in one zip, and torch itself does not care about the case of a name.
    """
    stretch = _Stretch(path, start, size)
    infos = [info for info in _directory(stretch) if info.orig_filename.lower().endswith(".pkl")]
    for record in [_record(stretch, info) for info in infos]:
        _check_size(path, record)
        refuse_code(path, io.BytesIO(stretch.read_record(record)))


def _is_tar(stream: BinaryIO) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except (tarfile.TarError, OSError, ValueError):
        return False
    finally:
        stream.seek(0)


def _pickle_record(path: Path, records: Mapping[str, Record]) -> Record:
    found = [record for name, record in records.items() if name.lower().endswith("/data.pkl")]
    if len(found) != 1 or found[0].name.count("/") != 1 or not found[0].name.endswith("/data.pkl"):
        raise _damaged(path, f"expected one data.pkl, found {len(found)}")
    (record,) = found
    prefix = record.name.removesuffix("data.pkl").lower()
    if any(name.lower().startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in records):
        raise FileFormatError(f"{path}: a TorchScript module, which is a program", hint="save its state_dict() instead")
    _check_size(path, record)
    return record


def _check_size(path: Path, record: Record) -> None:
    if record.num_bytes > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{path}: its pickle has {record.num_bytes} bytes, over the limit of {MAX_PICKLE_BYTES}")


def _not_a_zip(path: Path, head: bytes) -> FileFormatError:
    if not any(head):  # empty, or room that was set aside and never written
        return HalfWrittenError(f"{path}: empty: expected a torch file", hint=_SAVE_AGAIN)
    if head[:1] == b"\x80":
        convert = f"import torch; f={str(path)!r}; torch.save(torch.load(f, weights_only=True), f + '.new.pt')"
        return FileFormatError(
            f"{path}: an old torch file (before torch 1.6), expected a zip", hint=f"python -c {shlex.quote(convert)}"
        )
    return FileFormatError(
        f"{path}: not a torch file: expected a zip, found {bytes(head[:8])!r}",
        hint="the file is damaged or something else: save or download it again, or keep it out of this folder",
    )


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint=_SAVE_AGAIN)


class _Stretch:
    """A stretch of a file, which begins at 0 for whoever reads it. A small one is read once, however many ask for it."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self.path, self.start, self.size = path, start, size
        self._data = read_bytes(path, start, size) if size <= _SMALL_BYTES else None

    def read(self, offset: int, count: int) -> bytes:
        if self._data is not None and 0 <= offset <= offset + count <= self.size:
            return self._data[offset : offset + count]
        return read_bytes(self.path, self.start + offset, count)

    def read_record(self, record: Record, most: int | None = None) -> bytes:
        count = record.num_bytes if most is None else min(record.num_bytes, most)
        return self.read(record.offset - self.start, count)


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own, for zipfile to read."""

    def __init__(self, stretch: _Stretch) -> None:
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
            raise ValueError(f"a directory of {count} bytes")
        data = self._stretch.read(self._position, count)
        self._position += count
        return data


def _directory(stretch: _Stretch) -> list[zipfile.ZipInfo]:
    """A zip's own list of its records, where no other reader can see another list."""
    try:
        with zipfile.ZipFile(_Window(stretch)) as archive:
            infos, begin = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, UnicodeDecodeError) as error:
        raise HalfWrittenError(f"{stretch.path}: not a whole zip file: {error}", hint=_SAVE_AGAIN) from error
    if begin not in _told_directories(stretch):
        raise _damaged(stretch.path, "its directory of records is not where its end says")
    return infos


def _told_directories(stretch: _Stretch) -> set[int]:
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


def _read_records(stretch: _Stretch) -> dict[str, Record]:
    records: dict[str, Record] = {}
    folded: set[str] = set()
    for info in _directory(stretch):
        record = _record(stretch, info)
        if record.name.lower() in folded:
            raise _damaged(stretch.path, f"record {record.name!r} is there twice")
        folded.add(record.name.lower())
        records[record.name] = record
    _check_overlap(stretch.path, records)
    return records


def _record(stretch: _Stretch, info: zipfile.ZipInfo) -> Record:
    name = info.orig_filename
    if not name.isprintable() or "\\" in name or {"", ".."} & set(name.rstrip("/").split("/")):
        raise UnsafeFileError(f"{stretch.path}: a record is called {name!r}", hint=_SAVE_AGAIN)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise UnsafeFileError(
            f"{stretch.path}: record {name!r} is compressed or encrypted; torch stores plainly",
            hint="load and save it again with torch, or keep the file out of this folder",
        )
    return Record(stretch.path, name, stretch.start + _data_offset(stretch, info), info.file_size)


def _data_offset(stretch: _Stretch, info: zipfile.ZipInfo) -> int:
    if info.header_offset + _LOCAL_BYTES > stretch.size:
        raise _damaged(stretch.path, f"record {info.filename!r} reaches beyond the end of the file")
    local = stretch.read(info.header_offset, _LOCAL_BYTES)
    if local[:4] != _ZIP_MARK:
        raise _damaged(stretch.path, f"record {info.filename!r} has no header")
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    offset = info.header_offset + _LOCAL_BYTES + name_length + extra_length
    if offset + info.file_size > stretch.size:
        raise _damaged(stretch.path, f"record {info.filename!r} reaches beyond the end of the file")
    return offset


def _check_overlap(path: Path, records: Mapping[str, Record]) -> None:
    end, last = 0, ""
    for record in sorted(records.values(), key=lambda record: record.offset):
        if record.offset < end:
            raise _damaged(path, f"records {last!r} and {record.name!r} overlap")
        end, last = record.offset + record.num_bytes, record.name


def _check_byte_order(stretch: _Stretch, record: Record | None) -> None:
    if record is not None and stretch.read_record(record, most=16) != b"little":
        raise FileFormatError(f"{stretch.path}: written on a big-endian machine; expected little-endian")


def _check_ref(file: TorchFile, ref: TensorRef | StorageRef) -> None:
    """A tensor must lie inside its storage, and the storage inside its record."""
    storage = ref.storage if isinstance(ref, TensorRef) else ref
    record = file.records.get(f"{file.prefix}/data/{storage.key}")
    if record is None or record.num_bytes < storage.num_bytes:
        raise _damaged(file.path, f"storage {storage.key!r} is missing or shorter than its tensors")
    if isinstance(ref, StorageRef):
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.stride, strict=True))
    end = (ref.offset + (extent if all(ref.shape) else 0)) * ref.dtype.itemsize
    if ref.offset < 0 or end > storage.num_bytes:
        raise _damaged(file.path, f"a tensor of shape {list(ref.shape)} reaches beyond its storage {storage.key!r}")
