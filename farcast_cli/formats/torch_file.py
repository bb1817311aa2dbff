"""What `torch.save` writes: a zip of one pickle and one record of raw bytes per storage.

Knows where the bytes of every tensor lie, having checked that they lie inside their records and the records inside
the file. No tensor is loaded; torch_pickle.py says what becomes of the pickle.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.formats.files import file_size, read_bytes, refuse_lfs_pointer
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, decode_pickle, iter_storages, refuse_code, unsafe
from farcast_cli.tensors import TensorEntry, is_row_major

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_PICKLE_BYTES = 1 << 28  # 256 MiB: names and numbers only, a million tensors take less
MAX_SCAN_BYTES = 1 << 26  # of a file that is only copied
_ZIP_MARK = b"PK\x03\x04"
_SAVE_AGAIN = "the file is damaged or half-written: save or download it again"
_LOCAL_BYTES = 30  # of a record's header, before its name


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
    records = _read_records(path, start, size)
    pickled = _pickle_record(path, records)
    prefix = pickled.name.removesuffix("/data.pkl")
    _check_byte_order(path, records.get(f"{prefix}/byteorder"))
    raw = read_bytes(path, pickled.offset, pickled.num_bytes)
    file = TorchFile(path, decode_pickle(path, raw), records, prefix, size, hashlib.sha256(raw).hexdigest())
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
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, MAX_SCAN_BYTES))
    if not head.startswith(_ZIP_MARK):
        refuse_code(path, head)
        return
    try:
        pickled = _pickle_record(path, _read_records(path, 0, size))
    except UnsafeFileError:
        raise
    except FileFormatError:  # some other zip
        return
    refuse_code(path, read_bytes(path, pickled.offset, pickled.num_bytes))


def _pickle_record(path: Path, records: Mapping[str, Record]) -> Record:
    found = [record for name, record in records.items() if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise _damaged(path, f"expected one data.pkl, found {len(found)}")
    (record,) = found
    if any(name.startswith(f"{record.name.removesuffix('data.pkl')}code/") for name in records):
        raise FileFormatError(f"{path}: a TorchScript module, which is a program", hint="save its state_dict() instead")
    if record.num_bytes > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{path}: its pickle has {record.num_bytes} bytes, over the limit of {MAX_PICKLE_BYTES}")
    return record


def _not_a_zip(path: Path, head: bytes) -> FileFormatError:
    if not any(head):  # empty, or room that was set aside and never written
        return HalfWrittenError(f"{path}: empty: expected a torch file", hint=_SAVE_AGAIN)
    if head[:1] == b"\x80":
        convert = f"import torch; f={str(path)!r}; torch.save(torch.load(f, weights_only=True), f + '.new.pt')"
        return FileFormatError(f"{path}: an old torch file (before torch 1.6), expected a zip", hint=f'python -c "{convert}"')
    return FileFormatError(
        f"{path}: not a torch file: expected a zip, found {bytes(head[:8])!r}",
        hint="the file is damaged or something else: save or download it again, or keep it out of this folder",
    )


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint=_SAVE_AGAIN)


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own, for zipfile to read."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        super().__init__()
        self._path, self._start, self._size, self._position = path, start, size, 0

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
        data = read_bytes(self._path, self._start + self._position, count)
        self._position += count
        return data


def _read_records(path: Path, start: int, size: int) -> dict[str, Record]:
    records: dict[str, Record] = {}
    try:
        with zipfile.ZipFile(_Window(path, start, size)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise HalfWrittenError(f"{path}: not a whole zip file: {error}", hint=_SAVE_AGAIN) from error
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise UnsafeFileError(
                f"{path}: record {info.filename!r} is compressed or encrypted; torch stores plainly",
                hint="load and save it again with torch, or keep the file out of this folder",
            )
        if info.filename in records:
            raise _damaged(path, f"record {info.filename!r} is there twice")
        records[info.filename] = Record(path, info.filename, start + _data_offset(path, info, start, size), info.file_size)
    _check_overlap(path, records)
    return records


def _data_offset(path: Path, info: zipfile.ZipInfo, start: int, size: int) -> int:
    if info.header_offset + _LOCAL_BYTES > size:
        raise _damaged(path, f"record {info.filename!r} reaches beyond the end of the file")
    local = read_bytes(path, start + info.header_offset, _LOCAL_BYTES)
    if local[:4] != _ZIP_MARK:
        raise _damaged(path, f"record {info.filename!r} has no header")
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    offset = info.header_offset + _LOCAL_BYTES + name_length + extra_length
    if offset + info.file_size > size:
        raise _damaged(path, f"record {info.filename!r} reaches beyond the end of the file")
    return offset


def _check_overlap(path: Path, records: Mapping[str, Record]) -> None:
    end, last = 0, ""
    for record in sorted(records.values(), key=lambda record: record.offset):
        if record.offset < end:
            raise _damaged(path, f"records {last!r} and {record.name!r} overlap")
        end, last = record.offset + record.num_bytes, record.name


def _check_byte_order(path: Path, record: Record | None) -> None:
    if record is not None and read_bytes(path, record.offset, min(record.num_bytes, 16)) != b"little":
        raise FileFormatError(f"{path}: written on a big-endian machine; expected little-endian")


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
