"""What a file is by its first bytes, whatever it is called. One short read; the rest of the file is not looked at.

Source: the formats' own specifications; PKWARE's APPNOTE, 4.3.7, for the name of a zip's first record.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from farcast_cli.files.reading import Mark, mark_of, read_bytes
from farcast_cli.formats.zip_file import ZIP_MARK

if TYPE_CHECKING:
    from pathlib import Path

FileKind = Literal[
    "torch", "old torch", "safetensors", "stable-baselines3", "numpy", "keras", "hdf5", "gguf", "zip", "tar", "packed",
    "pickle", "msgpack", "tflite", "media", "database", "unknown",
]  # fmt: skip
_HEAD_BYTES = 512  # a tar tells itself in byte 257
_MIN_SAFETENSORS = 10  # bytes: the header's length and an empty header
_MARKS: tuple[tuple[bytes, FileKind], ...] = (
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "old torch"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"GGUF", "gguf"),
    (b"\x93NUMPY", "numpy"),
    *((mark, "packed") for mark in (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh", b"7z\xbc\xaf", b"Rar!")),
    *((bytes([0x80, protocol]), "pickle") for protocol in range(2, 6)),
    *((mark, "media") for mark in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"%PDF-", b"OggS", b"ID3")),
    (b"SQLite format 3\0", "database"),
)
_MARKS_WITHIN: tuple[tuple[int, bytes, FileKind], ...] = ((257, b"ustar", "tar"), (4, b"TFL3", "tflite"), (4, b"ftyp", "media"))
_RECORDS: tuple[tuple[str, FileKind], ...] = (
    (r"[^/]+/data\.pkl", "torch"),
    (r"data|policy(?:\.optimizer)?\.pth|pytorch_variables\.pth|_stable_baselines3_version", "stable-baselines3"),
    (r".*\.npy", "numpy"),
    (r"metadata\.json|config\.json|model\.weights\.h5", "keras"),
)
"""What the first record of a zip is called."""
_FLAX = re.compile(rb"[\x81-\x8f](?:[\xa1-\xbf]|\xd9.)[\w/.:-]")
"""The beginning of a msgpack map of at most 15 keys, the first one a text: what flax writes."""


def kind_of(path: Path) -> FileKind:
    """The kind of a regular file; `unknown` where its first bytes do not tell, it is empty, or may not be read.

    A zip is told by its first record alone. Cost: at most 512 bytes, once as long as the file does not change.

    Raises:
        UnreadableError: the system fails at it.
    """
    return _kind(path, mark_of(path)) if os.access(path, os.R_OK) else "unknown"


@lru_cache(maxsize=1 << 16)  # a folder may hold thousands of samples, and each command asks more than once
def _kind(path: Path, file: Mark) -> FileKind:
    head = read_bytes(path, 0, min(file[0], _HEAD_BYTES))
    if head.startswith(ZIP_MARK):
        return _kind_of_zip(head)
    told = next((kind for start, kind in _MARKS if head.startswith(start)), None)
    if told:
        return told
    if _is_safetensors(head, file[0]):
        return "safetensors"
    within = next((kind for offset, mark, kind in _MARKS_WITHIN if head[offset : offset + len(mark)] == mark), None)
    return within or ("msgpack" if _FLAX.match(head) else "unknown")


def _kind_of_zip(head: bytes) -> FileKind:
    length = int.from_bytes(head[26:28], "little")
    name = head[30 : 30 + length].decode("utf-8", "replace")
    return next((kind for pattern, kind in _RECORDS if re.fullmatch(pattern, name)), "zip")


def _is_safetensors(head: bytes, num_bytes: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return num_bytes >= _MIN_SAFETENSORS and length <= num_bytes - 8 and head[8:10] in {b'{"', b"{}"}
