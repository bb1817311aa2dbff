"""What `torch.save` writes: a zip of one pickle and one record of raw bytes per storage.

Knows where the bytes of every tensor lie, having checked that they lie inside their records and the records inside
the file. No tensor is loaded; torch_pickle.py says what becomes of the pickle.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, UnsafeFileError
from farcast_cli.formats.files import file_size, read_bytes, refuse_lfs_pointer
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, decode_pickle, iter_tensors
from farcast_cli.tensors import TensorEntry, is_row_major

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_PICKLE_BYTES = 1 << 28  # 256 MiB: names and numbers only, a million tensors take less
STORAGE_ALIGNMENT = 64  # torch.save's own


@dataclass(frozen=True, slots=True)
class Record:
    """Where a zip record's bytes lie in the file."""

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
        offset = self.storage_record(ref.storage).offset + ref.offset * ref.dtype.itemsize
        strides = () if is_row_major(ref.shape, ref.stride) else ref.stride
        return TensorEntry(name, ref.dtype, ref.shape, self.path, offset, strides)


def read_torch_file(path: Path) -> TorchFile:
    """Read a torch file's object tree; costs its directory and its pickle, no tensor data.

    Raises:
        UnsafeFileError: the pickle names something outside the list of harmless names.
        FileFormatError: not a torch zip file, damaged, compressed, big-endian, or records that do not fit.
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, 32))
    refuse_lfs_pointer(path, head)
    if not head.startswith(b"PK\x03\x04"):
        raise _not_a_zip(path, head)
    records = _read_records(path, size)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _damaged(path, f"expected one data.pkl, found {len(pickles)}")
    prefix = pickles[0].removesuffix("/data.pkl")
    _check_byte_order(path, records.get(f"{prefix}/byteorder"))
    if records[pickles[0]].num_bytes > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{path}: its pickle has {records[pickles[0]].num_bytes} bytes, over the limit")
    raw = read_bytes(path, records[pickles[0]].offset, records[pickles[0]].num_bytes)
    tree = decode_pickle(path, raw)
    file = TorchFile(path, tree, records, prefix, size, hashlib.sha256(raw).hexdigest())
    try:
        for _, ref in iter_tensors(tree):
            _check_ref(file, ref)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path}: {error}") from error
    return file


def zip_info(name: str, *, position: int, num_bytes: int) -> zipfile.ZipInfo:
    """A record header with a fixed date whose data start at a multiple of 64 bytes when written at `position`."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.file_size = num_bytes
    zip64_bytes = 20  # zipfile puts this field in front whenever it is asked to allow for large records
    start = position + 30 + len(name.encode()) + zip64_bytes + 4
    padding = -start % STORAGE_ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return info


def _not_a_zip(path: Path, head: bytes) -> FileFormatError:
    if head[:1] == b"\x80":
        convert = f"import torch; f={str(path)!r}; torch.save(torch.load(f, weights_only=True), f + '.new.pt')"
        return FileFormatError(f"{path}: an old torch file (before torch 1.6), expected a zip", hint=f'python -c "{convert}"')
    return FileFormatError(
        f"{path}: not a torch file: expected a zip, found {bytes(head[:8])!r}",
        hint="the file is damaged or something else: save or download it again, or keep it out of this folder",
    )


def _damaged(path: Path, what: str) -> FileFormatError:
    return FileFormatError(f"{path}: {what}", hint="the file is damaged or half-written: save or download it again")


def _read_records(path: Path, size: int) -> dict[str, Record]:
    records: dict[str, Record] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _damaged(path, f"not a whole zip file: {error}") from error
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise UnsafeFileError(f"{path}: record {info.filename!r} is compressed or encrypted; torch stores plainly")
        if info.filename in records:
            raise _damaged(path, f"record {info.filename!r} is there twice")
        records[info.filename] = Record(info.filename, _data_offset(path, info, size), info.file_size)
    _check_overlap(path, records)
    return records


def _data_offset(path: Path, info: zipfile.ZipInfo, size: int) -> int:
    local = read_bytes(path, info.header_offset, 30)
    if local[:4] != b"PK\x03\x04":
        raise _damaged(path, f"record {info.filename!r} has no header")
    name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
    offset = info.header_offset + 30 + name_length + extra_length
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


def _check_ref(file: TorchFile, ref: TensorRef) -> None:
    """A tensor must lie inside its storage, and the storage inside its record."""
    record = file.records.get(f"{file.prefix}/data/{ref.storage.key}")
    if record is None or record.num_bytes < ref.storage.num_bytes:
        raise _damaged(file.path, f"storage {ref.storage.key!r} is missing or shorter than its tensors")
    extent = 1 + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.stride, strict=True))
    end = (ref.offset + (extent if all(ref.shape) else 0)) * ref.dtype.itemsize
    if ref.offset < 0 or end > ref.storage.num_bytes:
        raise _damaged(file.path, f"a tensor of shape {list(ref.shape)} reaches beyond its storage {ref.storage.key!r}")


# --- writing ---------------------------------------------------------------------------------------------------------
