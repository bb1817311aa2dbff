"""Compressed bytes as a stream of what they unpack to: gzip, zlib, bzip2, xz and lzma, within limits.

A few bytes may unpack to GBs, and an xz header may ask for GBs of memory at once.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from typing import TYPE_CHECKING, Any, Protocol

from farcast_cli.errors import UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

    from farcast_cli.formats.pickle_scan import Stream

MAX_UNPACKED_BYTES = 1 << 28
_MAX_XZ_BYTES = 1 << 27  # of working memory; `xz -9` asks for half of it
_CHUNK_BYTES = 1 << 16
_DAMAGED = "its packed bytes are damaged, so that two programs may unpack them in two ways"


class _Unpacker(Protocol):
    """What zlib, bz2 and lzma have in common once `_Zlib` has made one of zlib's."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    """zlib's decompressor with the manners of the other two."""

    def __init__(self, window_bits: int) -> None:
        self._inner = zlib.decompressobj(window_bits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        made = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = len(made) < max_length and not self._inner.unconsumed_tail
        return made


def _deflated() -> Any:
    return _Zlib(-15)


def _xz() -> Any:
    return lzma.LZMADecompressor(memlimit=_MAX_XZ_BYTES)


_BY_MARK: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: _Zlib(31)),
    *((b"x" + level, lambda: _Zlib(15)) for level in (b"\x01", b"\x5e", b"\x9c", b"\xda")),
    *((b"BZh%d" % level + magic, bz2.BZ2Decompressor) for level in range(1, 10) for magic in (b"1AY&SY", b"\x17rE8P\x90")),
    (b"\xfd7zXZ\x00", _xz),
    (b"]\x00", _xz),  # as joblib tells lzma
)
_ALONE_BYTES = 13  # of an lzma file's header: settings, size of its dictionary, size of what it unpacks to
_MAX_SETTINGS = 9 * 5 * 5
_DICTIONARY_BYTES = 1 << 26
_GUESS_BYTES = 512  # unpacked at once: an error costs no more of what came before it
_OLD_JOBLIB = re.compile(rb"ZF[\s\w+]{19} ?[\x08-\x78]", re.DOTALL)


class _Unpacked(io.RawIOBase):
    """What a stream unpacks to. One that is cut ends there; one that is damaged is refused.

    Others get further than zlib in damaged bytes: Python's gzip reads on over a wrong header and a wrong checksum.
    """

    def __init__(self, stream: Stream, make: Callable[[], Any]) -> None:
        super().__init__()
        self._stream, self._make, self._position = stream, make, 0
        self._unpacker: _Unpacker = make()
        self._is_over = False

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view, count = memoryview(buffer).cast("B"), 0
        while count < len(view) and not self._is_over:
            made = self._next(len(view) - count)
            view[count : count + len(made)] = made
            count += len(made)
        self._position += count
        if self._position > MAX_UNPACKED_BYTES:
            raise UnsafeFileError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
        return count

    def _next(self, most: int) -> bytes:
        data = b""
        if self._unpacker.eof:  # gzip, bzip2 and xz files may follow one another in one
            data = self._behind(self._unpacker.unused_data)
            self._is_over = not data
            self._unpacker = self._make()
        elif self._unpacker.needs_input:
            data = self._stream.read(_CHUNK_BYTES)
            self._is_over = not data
        try:
            return b"" if self._is_over else self._unpacker.decompress(data, most)
        except lzma.LZMAError as error:
            if "limit" in str(error):
                raise UnsafeFileError(f"it takes more than {_MAX_XZ_BYTES} bytes of memory to unpack") from error
            raise UnsafeFileError(_DAMAGED) from error
        except (zlib.error, OSError, EOFError, ValueError) as error:
            raise UnsafeFileError(_DAMAGED) from error

    def _behind(self, data: bytes) -> bytes:
        """What follows the end of packed bytes, without the zeros that may fill up a block."""
        data = data.lstrip(b"\0")
        while not data and (more := self._stream.read(_CHUNK_BYTES)):
            data = more.lstrip(b"\0")
        return data


class _Guessed(_Unpacked):
    """What may be lzma, which has no mark: where it cannot be unpacked it ends."""

    def _next(self, most: int) -> bytes:
        try:
            made = b"" if self._unpacker.eof else super()._next(min(most, _GUESS_BYTES))
        except UnsafeFileError:
            made = b""
            self._is_over = True
        self._is_over = self._is_over or self._unpacker.eof
        return made


def guessed_lzma(stream: Stream) -> Stream | None:
    """What a stream unpacks to if its head could be that of an lzma file, whatever its dictionary."""
    head = stream.peek(_ALONE_BYTES + 1)[: _ALONE_BYTES + 1]
    told = head[5:_ALONE_BYTES]
    if len(head) <= _ALONE_BYTES or head[0] >= _MAX_SETTINGS or head[-1] or (any(told[5:]) and told != b"\xff" * 8):
        return None
    dictionary = min(int.from_bytes(head[1:5], "little"), _DICTIONARY_BYTES)
    header = head[:1] + dictionary.to_bytes(4, "little") + told

    def make() -> Any:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE)
        unpacker.decompress(header, 0)
        return unpacker

    try:
        guessed = _Guessed(stream, make)
    except lzma.LZMAError:
        return None
    stream.read(_ALONE_BYTES)
    return io.BufferedReader(guessed, _CHUNK_BYTES)


def unpacked(stream: Stream) -> Stream:
    """What a stream unpacks to if it begins like compressed bytes; else the stream itself."""
    head = stream.peek(32)
    if _OLD_JOBLIB.match(head):
        raise UnsafeFileError("it is packed as joblib did before 2015, which is not looked into")
    make = next((make for mark, make in _BY_MARK if head.startswith(mark)), None)
    return io.BufferedReader(_Unpacked(stream, make), _CHUNK_BYTES) if make else stream


def inflated(stream: Stream) -> Stream:
    """What the bytes of a zip's compressed record unpack to."""
    return io.BufferedReader(_Unpacked(stream, _deflated), _CHUNK_BYTES)
