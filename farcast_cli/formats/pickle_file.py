"""A plain pickle of one object, as loops save their counters: read into inert stand-ins, and written from them."""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from farcast_cli.errors import FileFormatError
from farcast_cli.files.reading import file_size, read_bytes
from farcast_cli.formats.torch_pickle import decode_pickle, iter_storages

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 1 << 24
"""Of a pickle that is read; a larger one holds data, not counters."""
_PROTO = pickle.PROTO[0]


@dataclass(frozen=True, slots=True)
class PickleFile:
    """A pickle's object tree. The tree belongs to the reader, who may edit it."""

    path: Path
    tree: Any


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later does, and is small enough to be read."""
    size = file_size(path)
    return 0 < size <= MAX_BYTES and read_bytes(path, 0, 1)[0] == _PROTO


def read_pickle(path: Path) -> PickleFile:
    """Read a pickle; nothing in it runs.

    Raises:
        UnsafeFileError: it names something that is no data, or is made to exhaust its reader.
        FileFormatError: damaged, or more than one object.
    """
    raw = read_bytes(path, 0, file_size(path))
    tree = decode_pickle(path, raw)
    if any(True for _ in iter_storages(tree)):
        raise FileFormatError(f"{path}: a pickle with tensors of a torch file in it")
    if _end_of(raw) != len(raw):
        raise FileFormatError(f"{path}: more than one pickle, expected one")
    return PickleFile(path, tree)


def _end_of(raw: bytes) -> int:
    """Where the first pickle ends; it has been read, so it does."""
    stream = io.BytesIO(raw)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()
