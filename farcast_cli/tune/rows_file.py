"""A file of labelled rows: which arrays it holds, by its headers alone, and their rows a block at a time.

Knows what a hostile or damaged archive can claim. Of an .npz, every size is compared with the zip's own directory before
memory is taken for it, and nothing is unpacked beyond that; only what numpy itself writes is read: members that are stored
or deflated, of plain numbers.
"""

from __future__ import annotations

import ast
import os
import re
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import numpy as np

from farcast_cli.errors import DataError, FarcastError, FileFormatError, UnsafeFileError, UsageError
from farcast_cli.files.reading import Input, file_size, read_bytes
from farcast_cli.formats.safetensors_file import read_safetensors
from farcast_cli.formats.torch_file import read_torch_file
from farcast_cli.formats.torch_pickle import TensorRef
from farcast_cli.tensors import FLOATING
from farcast_cli.tune.numbers import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from farcast_cli.tensors import TensorEntry

BLOCK_BYTES = 8 << 20  # of rows that are looked at together
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file, or of a zip's directory: room for some thousand arrays
MAX_NPY_HEADER = 10_000  # bytes; numpy's own limit
MAX_WHOLE = 1 << 27  # numbers of an array that cannot be read row by row: 1 GiB of float64
_INTEGERS = {"int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "i1", "uint8": "u1", "uint16": "<u2", "uint32": "<u4"}
_ZIP_MARK = b"PK\x03\x04"
_ENCRYPTED = 0x1 | 0x40  # of a zip member's flags
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_PREFIX = {(1, 0): 10, (2, 0): 12}
"""Bytes of an .npy before its header, by version; a later one is for names that plain numbers do not have."""
_NUMBERS = re.compile(r"[<>|=]?(?:f[248]|[iu][1248])|\|b1")
_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
"""Shape, whether it is stored by columns, element type."""
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array by its header. `blocks` reads it: its rows in order, some MiB at a time, of `dtype`."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[], Iterator[NDArray[Any]]]


def open_rows(path: Path, names: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> dict[str, StoredArray]:
    """The named arrays of a .safetensors, .npz or .pt file, of which only headers are read; the optional ones, where they are there.

    Raises:
        FileFormatError: no such file, none of these formats, or damaged.
        UnsafeFileError: an array of pickled objects.
        DataError: an array is missing, is there twice, or holds no plain numbers.
    """
    if path.suffix not in _READERS:
        raise UsageError(f"{path}: expected a .safetensors, .npz or .pt file with {' and '.join(names)}")
    file_size(path)  # which says that it is not there
    found = _READERS[path.suffix](path, (*names, *optional))
    for name in names:
        if name not in found:
            raise DataError(f"{path}: no array {name!r}", hint="x contains the inputs of the layer, y its targets or labels")
    for name, array in found.items():
        if not array.shape:
            raise DataError(f"{path}: {name}: expected rows of numbers, found {array.dtype} of shape []")
    return found


def _rows_at_once(shape: tuple[int, ...], itemsize: int) -> int:
    return max(1, BLOCK_BYTES // max(1, prod(shape[1:]) * itemsize))


# --- safetensors -----------------------------------------------------------------------------------------------------


def _in_safetensors(path: Path, names: tuple[str, ...]) -> dict[str, StoredArray]:
    size = file_size(path)
    length = int.from_bytes(read_bytes(path, 0, min(size, 8)), "little")
    if MAX_HEADER_BYTES < length < size:
        raise FileFormatError(
            f"{path}: its header: expected at most {MAX_HEADER_BYTES} bytes, found {length}",
            hint=f"save {' and '.join(names)} in a separate file",
        )
    return {entry.name: _stored(entry) for entry in read_safetensors(path).entries if entry.name in names}


def _stored(entry: TensorEntry) -> StoredArray:
    kind = entry.dtype.name
    if kind not in FLOATING and kind not in _INTEGERS:
        raise DataError(
            f"{entry.path}: {entry.name} is {kind}: expected plain numbers", hint=f"{entry.name}.long() or .float()"
        )

    def values(raw: bytes) -> NDArray[Any]:
        return decode(raw, entry.dtype) if kind in FLOATING else np.frombuffer(raw, _INTEGERS[kind])

    def blocks() -> Iterator[NDArray[Any]]:
        row_bytes = entry.dtype.itemsize * prod(entry.shape[1:])
        count = _rows_at_once(entry.shape, entry.dtype.itemsize)
        for start in range(0, entry.shape[0], count):
            rows = min(count, entry.shape[0] - start)
            raw = read_bytes(entry.path, entry.offset + start * row_bytes, rows * row_bytes)
            yield values(raw).reshape(rows, *entry.shape[1:])

    return StoredArray(entry.path, entry.name, entry.shape, values(b"").dtype, blocks)


def _in_torch(path: Path, names: tuple[str, ...]) -> dict[str, StoredArray]:
    """The tensors of a dict that torch.save wrote; nothing else of it is made."""
    tree = read_torch_file(path)
    if not isinstance(tree.tree, dict):
        raise DataError(f"{path}: expected a dict of tensors", hint="torch.save({'x': ..., 'y': ...}, FILE)")
    found = {}
    for name in names:
        value = tree.tree.get(name)
        if isinstance(value, TensorRef):
            found[name] = _stored(tree.entry(name, value))
            if tree.entry(name, value).strides:
                raise DataError(f"{path}: {name} is not stored row by row", hint=f"{name}.contiguous()")
        elif value is not None:
            raise DataError(f"{path}: {name}: expected a tensor, found none", hint=f"torch.as_tensor({name})")
    return found


# --- npz -------------------------------------------------------------------------------------------------------------


def _in_npz(path: Path, names: tuple[str, ...]) -> dict[str, StoredArray]:
    found = {}
    with _archive(path) as archive:
        for name in names:
            members = [info for info in archive.infolist() if info.filename in {name, f"{name}.npy"}]
            if len(members) > 1:
                raise DataError(f"{path}: expected one array {name!r}, found {len(members)}", hint=_HINT)
            if members:
                found[name] = _stored_npy(path, name, archive, members[0])
    return found


_HINT = "write it with numpy.savez(FILE, x=..., y=...)"


def _damaged(path: Path, what: object) -> FarcastError:
    return FileFormatError(f"{path}: not a readable .npz file: {what}", hint=_HINT)


class _Bounded(Input):
    """A file of which nobody reads much at once: a zip's directory is read whole, however long it says that it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        count = os.fstat(self.fileno()).st_size - self.tell() if size is None or size < 0 else size
        if count > MAX_HEADER_BYTES:
            raise zipfile.BadZipFile(f"its directory: expected at most {MAX_HEADER_BYTES} bytes, found {count}")
        return super().read(count)


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip, and one line for whatever is wrong with it."""
    try:
        with _Bounded(path) as file:
            if file.read(len(_ZIP_MARK)) != _ZIP_MARK:  # zipfile would look for a zip behind anything
                raise zipfile.BadZipFile("File is not a zip file")
            with zipfile.ZipFile(file) as archive:
                yield archive
    except _DAMAGE as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise _damaged(path, what or type(error).__name__) from error


@contextmanager
def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Any]:
    """A member as a stream, seen to be one that numpy writes."""
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
        found = "encrypted" if info.flag_bits & _ENCRYPTED else f"compressed by method {info.compress_type}"
        raise _damaged(path, f"{info.filename}: expected a member that is stored or deflated, found one {found}")
    with archive.open(info) as stream:
        yield stream


def _stored_npy(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    with _member(path, archive, info) as stream:
        header, start = _npy_header(path, info, stream)
    shape, is_by_columns, dtype = header
    where = f"{path}: {info.filename}"
    if min(shape, default=0) < 0:
        raise _damaged(path, f"{info.filename}: expected a shape without negative sizes, found {list(shape)}")
    expected, found = prod(shape) * dtype.itemsize, info.file_size - start
    if expected != found:
        what = f"{dtype} of shape {list(shape)}: expected {expected} bytes of data, found {found}"
        raise _damaged(path, f"{info.filename}: {what}")
    if is_by_columns and prod(shape) > MAX_WHOLE:
        raise DataError(
            f"{where}: expected at most {MAX_WHOLE} numbers in Fortran order, found {list(shape)}",
            hint=f"write it row by row: numpy.ascontiguousarray({name})",
        )

    def blocks() -> Iterator[NDArray[Any]]:
        with _archive(path) as again, _member(path, again, info) as stream:
            stream.read(start)
            if is_by_columns:
                yield _read(path, info, stream, prod(shape) * dtype.itemsize).view(dtype).reshape(shape, order="F")
                return
            count = _rows_at_once(shape, dtype.itemsize)
            for first in range(0, shape[0], count):
                rows = (min(count, shape[0] - first), *shape[1:])
                yield _read(path, info, stream, prod(rows) * dtype.itemsize).view(dtype).reshape(rows)

    return StoredArray(path, name, shape, dtype, blocks)


def _npy_header(path: Path, info: zipfile.ZipInfo, stream: Any) -> tuple[_Header, int]:
    """An .npy's header, and where the data begin; the stream stands there."""
    magic = stream.read(8)
    version = tuple(magic[6:8])
    if magic[:6] != b"\x93NUMPY" or version not in _PREFIX:
        raise _damaged(path, f"{info.filename}: expected an array of numbers in .npy format 1.0 or 2.0, found {magic!r}")
    num_bytes = int.from_bytes(stream.read(_PREFIX[version] - 8), "little")
    if num_bytes > MAX_NPY_HEADER:
        raise _damaged(path, f"{info.filename}: expected a header of at most {MAX_NPY_HEADER} bytes, found {num_bytes}")
    text = stream.read(num_bytes).decode("latin-1")
    try:
        with catch_warnings():
            simplefilter("ignore")  # of Python's about a text that is none of its programs
            header = ast.literal_eval(text.rstrip(" \n"))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise _damaged(path, f"{info.filename}: its header cannot be read: {text[:80]!r}") from error
    return _checked(path, info, header), _PREFIX[version] + num_bytes


def _checked(path: Path, info: zipfile.ZipInfo, header: object) -> _Header:
    """What a header says, seen to be of plain numbers."""
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise _damaged(path, f"{info.filename}: its header cannot be read: expected descr, fortran_order and shape")
    descr, shape = header["descr"], header["shape"]
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        raise _damaged(path, f"{info.filename}: its header cannot be read: expected whole numbers as shape")
    if not isinstance(header["fortran_order"], bool):
        raise _damaged(path, f"{info.filename}: its header cannot be read: expected True or False as fortran_order")
    if "'|O'" in repr(descr):
        raise UnsafeFileError(f"{path}: {info.filename}: holds pickled objects, which may run code: expected plain arrays")
    if not isinstance(descr, str) or not _NUMBERS.fullmatch(descr):
        name = info.filename.removesuffix(".npy")
        raise DataError(f"{path}: {name}: expected rows of numbers, found {descr} of shape {list(shape)}")
    return shape, header["fortran_order"], np.dtype(descr)


def _read(path: Path, info: zipfile.ZipInfo, stream: Any, num_bytes: int) -> NDArray[np.uint8]:
    """So many bytes, a little at a time."""
    found = np.empty(num_bytes, np.uint8)
    done = 0
    while done < num_bytes:
        count = stream.readinto(found[done : done + MAX_HEADER_BYTES].data)
        if not count:
            raise _damaged(path, f"{info.filename}: ends early: {num_bytes - done} bytes are missing")
        done += count
    return found


_READERS = {".safetensors": _in_safetensors, ".npz": _in_npz, ".pt": _in_torch}
