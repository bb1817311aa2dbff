"""A file that is copied as it is: what its usual loader would run, looked for without loading it.

What is looked at is told by content, not by name: pickles, as they are, compressed, behind a numpy header or in a
zip. docs/formats.md lists what is looked at and what is not. Only heads, structures and pickles are read.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
import tarfile
import zipfile
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from farcast_cli.errors import UnsafeFileError
from farcast_cli.files.reading import file_size, open_input
from farcast_cli.formats.pickle_names import runs_code
from farcast_cli.formats.pickle_scan import MAX_OPCODES, iter_names, peek
from farcast_cli.formats.torch_pickle import unsafe
from farcast_cli.formats.unpacked import guessed_lzma, inflated, unpacked
from farcast_cli.formats.zip_file import (
    ZIP_MARK,
    Span,
    Window,
    ZipMember,
    data_offset,
    directory,
    plain_record,
    refuse_overlap,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from farcast_cli.formats.pickle_scan import Stream

_NUM_PICKLES = 5  # one behind the other in a file, as torch before 1.6 wrote them
_EMPTY_ZIP_MARK = b"PK\x05\x06"  # numpy takes what begins like this for a zip, whatever follows
_NUMPY_MARK = b"\x93NUMPY"
_MAX_HEADER = (1 << 20) - 1  # bytes of a numpy header; numpy itself reads no longer one than 10,000 unasked
_BUFFER_BYTES = 1 << 16
_PICKLED = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill"}
"""Endings of files that a trainer may unpickle; a tar is a torch file under one of them alone."""
_YAML = {".yaml", ".yml"}
_MAX_YAML_BYTES = 1 << 24
_YAML_TAG = re.compile(rb"python/(?:name|module|object(?:/apply|/new)?):([^\s,}\]>]*)")


def refuse_code_in(path: Path) -> None:
    """Refuse a file that would run code where its usual loader reads it; anything else passes.

    Raises:
        UnsafeFileError: it names a function of the system's, or hides what it names.
        FileFormatError: it is a zip that is not whole, or that two readers would read in two ways.
    """
    with open_input(path, _BUFFER_BYTES) as stream:
        if peek(stream, len(ZIP_MARK)) in {ZIP_MARK, _EMPTY_ZIP_MARK}:
            refuse_code_in_stretch(path, 0, file_size(path))
        elif path.suffix.lower() in _YAML:
            _refuse_tags(path, stream.read(_MAX_YAML_BYTES + 1))
        elif _PICKLED & {suffix.lower() for suffix in path.suffixes} and _is_tar(stream):
            raise UnsafeFileError(f"{path}: a torch file from before torch 0.2, whose pickles cannot be looked into")
        else:
            opcodes = iter(range(MAX_OPCODES))
            _refuse_pickles(path, stream, opcodes)
            stream.seek(0)
            if guessed := guessed_lzma(stream):
                _refuse_pickles(path, guessed, opcodes)


def refuse_code_in_stretch(path: Path, start: int, size: int) -> None:
    """The same for a zip that is a stretch of a file.

    TorchScript has several pickles in one zip, and torch itself does not care about the case of a name.
    """
    stretch = Span(path, start, size)
    infos = directory(stretch)
    roots = {info.orig_filename.lower().removesuffix("data.pkl") for info in infos if _is_pickle(info)}
    refuse_overlap(stretch.path, [_packed(stretch, info) for info in infos])
    opcodes = iter(range(MAX_OPCODES))  # that the whole file may have
    for info in infos:
        _refuse_in_record(stretch, info, roots, opcodes)


def _is_pickle(info: zipfile.ZipInfo) -> bool:
    return info.orig_filename.lower().endswith(".pkl")


def _packed(stretch: Span, info: zipfile.ZipInfo) -> ZipMember:
    return ZipMember(stretch.path, info.orig_filename, stretch.start + data_offset(stretch, info), info.compress_size)


def _refuse_in_record(stretch: Span, info: zipfile.ZipInfo, roots: set[str], opcodes: Iterator[int]) -> None:
    """Look at a record; at one of torch's storages only as a numpy file: torch reads plain numbers from it."""
    if _is_pickle(info):
        plain_record(stretch, info)  # torch would unpack it whole
    if info.flag_bits & 1 or info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        return
    inner = Span(stretch.path, stretch.start + data_offset(stretch, info), info.compress_size)
    stream: Stream = io.BufferedReader(Window(inner), _BUFFER_BYTES)
    if info.compress_type == zipfile.ZIP_DEFLATED:
        stream = inflated(stream)
    folder, _, last = info.orig_filename.lower().rpartition("data/")
    _refuse_pickles(stretch.path, stream, opcodes, numpy_alone=folder in roots and last.isdecimal())


def _refuse_pickles(path: Path, stream: Stream, opcodes: Iterator[int], *, numpy_alone: bool = False) -> None:
    """Refuse pickles at a stream's start, compressed or behind a numpy header.

    What cannot be loaded is no concern of ours.
    """
    try:
        if numpy_alone and peek(stream, len(_NUMPY_MARK)) != _NUMPY_MARK:
            return
        stream = unpacked(stream)
        if peek(stream, len(_NUMPY_MARK)) == _NUMPY_MARK:
            _skip_numpy_header(stream)
        for number in itertools.count(1):
            _refuse_names(stream, opcodes)
            if number >= _NUM_PICKLES and peek(stream, 1) != pickle.PROTO:
                return
    except UnsafeFileError as error:
        raise unsafe(path, error) from error
    except EOFError:
        return


def _skip_numpy_header(stream: Stream) -> None:
    num_bytes = 2 if stream.read(8)[6:7] == b"\x01" else 4
    size = int.from_bytes(stream.read(num_bytes), "little")
    if size > _MAX_HEADER:
        raise UnsafeFileError(f"its numpy header has {size} bytes, over the limit of {_MAX_HEADER}")
    stream.read(size)


def _refuse_names(stream: Stream, opcodes: Iterator[int]) -> None:
    for module, name in iter_names(stream, opcodes):
        if runs_code(module, name):
            raise UnsafeFileError(f"its pickle asks for {module}.{name}")


def _is_tar(stream: Stream) -> bool:
    try:
        with tarfile.open(fileobj=stream, mode="r:"):
            return True
    except (tarfile.TarError, OSError, ValueError):
        return False
    finally:
        stream.seek(0)


def _refuse_tags(path: Path, text: bytes) -> None:
    """Refuse YAML whose tags name code, in whatever way they are spelled."""
    plain = unquote_to_bytes(text.replace(b"\0", b""))  # UTF-16 has a zero beside each letter
    if len(text) > _MAX_YAML_BYTES or b"%TAG" in plain:  # YAML has more ends of lines than one
        raise UnsafeFileError(f"{path}: YAML of more than {_MAX_YAML_BYTES} bytes, or with tags of its own")
    for tag in _YAML_TAG.finditer(plain):
        module, _, name = tag[1].decode("utf-8", "replace").rpartition(".")
        if runs_code(module or "builtins", name):
            raise unsafe(path, UnsafeFileError(f"it asks for {module or 'builtins'}.{name}"))
