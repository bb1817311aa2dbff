"""What `torch.save` writes: a zip of one pickle and one record of raw bytes per storage.

Knows where the bytes of every tensor lie, having checked that they lie inside their records and the records inside
the file. No tensor is loaded; torch_pickle.py says what becomes of the pickle.
"""

from __future__ import annotations

import hashlib
import shlex
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError, HalfWrittenError, UnsafeFileError
from farcast_cli.files.reading import file_size, read_bytes, refuse_lfs_pointer
from farcast_cli.formats.torch_pickle import StorageRef, TensorRef, decode_pickle, iter_storages, unsafe
from farcast_cli.formats.zip_file import SAVE_AGAIN, ZIP_MARK, Span, ZipMember, damaged, directory, plain_record, refuse_overlap
from farcast_cli.tensors import TensorEntry, is_row_major

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NUMBERS = {"float32": "<f", "float64": "<d", "int64": "<q", "int32": "<i"}
MAX_PICKLE_BYTES = 1 << 28  # 256 MiB: names and numbers only, a million tensors take less


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A torch file's object tree and records. The tree belongs to the reader, who may edit it."""

    path: Path
    tree: Any
    records: Mapping[str, ZipMember]
    prefix: str
    num_bytes: int
    digest: str

    def storage_record(self, storage: StorageRef) -> ZipMember:
        return self.records[f"{self.prefix}/data/{storage.key}"]

    def entry(self, name: str, ref: TensorRef) -> TensorEntry:
        """The tensor's place in the file."""
        record = self.storage_record(ref.storage)
        offset = record.offset + ref.offset * ref.dtype.itemsize
        strides = () if is_row_major(ref.shape, ref.stride) else ref.stride
        return TensorEntry(name, ref.dtype, ref.shape, record.path, offset, strides)


def as_number(file: TorchFile, value: object) -> int | float | None:
    """A number, or the one element of a tensor of the file; None for anything else."""
    if isinstance(value, TensorRef) and value.dtype.name in _NUMBERS and all(size == 1 for size in value.shape):
        entry = file.entry("", value)
        found: int | float
        (found,) = struct.unpack(_NUMBERS[value.dtype.name], read_bytes(entry.path, entry.offset, entry.num_bytes))
        return found
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def read_torch_file(path: Path) -> TorchFile:
    """Read a torch file's object tree; costs its directory and its pickle, no tensor data.

    Raises:
        UnsafeFileError: the pickle names something that is no data.
        FileFormatError: not a torch zip file, damaged, compressed, big-endian, or records that do not fit.
    """
    size = file_size(path)
    head = read_bytes(path, 0, min(size, 32))
    refuse_lfs_pointer(path, head)
    if not head.startswith(ZIP_MARK):
        raise _not_a_zip(path, head)
    return read_torch_stretch(path, 0, size)


def is_torch_zip(path: Path) -> bool:
    """Whether a file begins as a zip does."""
    return read_bytes(path, 0, min(file_size(path), len(ZIP_MARK))) == ZIP_MARK


def read_torch_stretch(path: Path, start: int, size: int) -> TorchFile:
    """The same for a torch file that is the stretch [start, start + size) of another."""
    stretch = Span(path, start, size)
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


def read_raw_pickle(path: Path) -> bytes:
    """The bytes of a torch file's pickle, looked into by nobody.

    Raises:
        UnsafeFileError: it is compressed, or the zip is made to exhaust its reader.
        FileFormatError: not a torch file.
    """
    stretch = Span(path, 0, file_size(path))
    infos = [info for info in directory(stretch) if info.orig_filename.endswith("/data.pkl")]
    if len(infos) != 1:
        raise damaged(path, f"expected one data.pkl, found {len(infos)}")
    record = plain_record(stretch, infos[0])
    _check_size(path, record)
    return stretch.read_record(record)


def _pickle_record(path: Path, records: Mapping[str, ZipMember]) -> ZipMember:
    found = [record for name, record in records.items() if name.lower().endswith("/data.pkl")]
    if len(found) != 1 or found[0].name.count("/") != 1 or not found[0].name.endswith("/data.pkl"):
        raise damaged(path, f"expected one data.pkl, found {len(found)}")
    (record,) = found
    prefix = record.name.removesuffix("data.pkl").lower()
    if any(name.lower().startswith((f"{prefix}code/", f"{prefix}constants.pkl")) for name in records):
        raise FileFormatError(f"{path}: a TorchScript module, which is a program", hint="save its state_dict() instead")
    _check_size(path, record)
    return record


def _check_size(path: Path, record: ZipMember) -> None:
    if record.num_bytes > MAX_PICKLE_BYTES:
        raise UnsafeFileError(f"{path}: its pickle has {record.num_bytes} bytes, over the limit of {MAX_PICKLE_BYTES}")


def refuse_half_written(path: Path) -> None:
    """See that a torch file has been saved to its end, by the zip's directory alone. What is no zip is for its reader to judge.

    Raises:
        HalfWrittenError: it is empty, only zeros at its start, or a zip without its end.
    """
    head = read_bytes(path, 0, min(file_size(path), 32))
    if head.startswith(ZIP_MARK):
        directory(Span(path, 0, file_size(path)))
    elif not any(head):
        raise _not_a_zip(path, head)


def _not_a_zip(path: Path, head: bytes) -> FileFormatError:
    if not any(head):  # empty, or room that was set aside and never written
        return HalfWrittenError(f"{path}: empty: expected a torch file", hint=SAVE_AGAIN)
    if head[:1] == b"\x80":
        convert = f"import torch; f={str(path)!r}; torch.save(torch.load(f, weights_only=True), f + '.new.pt')"
        return FileFormatError(
            f"{path}: an old torch file (before torch 1.6), expected a zip", hint=f"python -c {shlex.quote(convert)}"
        )
    return FileFormatError(
        f"{path}: not a torch file: expected a zip, found {bytes(head[:8])!r}",
        hint="the file is damaged or not a torch file: save or download it again, or move it out of this folder",
    )


def _read_records(stretch: Span) -> dict[str, ZipMember]:
    records: dict[str, ZipMember] = {}
    folded: set[str] = set()
    for info in directory(stretch):
        record = plain_record(stretch, info)
        if record.name.lower() in folded:
            raise damaged(stretch.path, f"record {record.name!r} is there twice")
        folded.add(record.name.lower())
        records[record.name] = record
    refuse_overlap(stretch.path, records.values())
    return records


def _check_byte_order(stretch: Span, record: ZipMember | None) -> None:
    if record is not None and stretch.read_record(record, most=16) != b"little":
        raise FileFormatError(f"{stretch.path}: written on a big-endian machine; expected little-endian")


def _check_ref(file: TorchFile, ref: TensorRef | StorageRef) -> None:
    """A tensor must lie inside its storage, and the storage inside its record."""
    storage = ref.storage if isinstance(ref, TensorRef) else ref
    record = file.records.get(f"{file.prefix}/data/{storage.key}")
    if record is None or record.num_bytes < storage.num_bytes:
        raise damaged(file.path, f"storage {storage.key!r} is missing or shorter than its tensors")
    if isinstance(ref, StorageRef):
        return
    extent = 1 + sum((size - 1) * stride for size, stride in zip(ref.shape, ref.stride, strict=True))
    end = (ref.offset + (extent if all(ref.shape) else 0)) * ref.dtype.itemsize
    if ref.offset < 0 or end > storage.num_bytes:
        raise damaged(file.path, f"a tensor of shape {list(ref.shape)} reaches beyond its storage {storage.key!r}")
